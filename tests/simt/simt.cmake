# What compiles CUDA kernels as C++ against tests/simt.
get_filename_component(D2NET_TESTS "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
get_filename_component(D2NET_ROOT "${D2NET_TESTS}" DIRECTORY)

# d2net_simt(target kernels.cu...): adds the kernels, and what runs them. `-fsanitize=thread` goes to the kernels through
# their target; what runs them is not instrumented (sanitizers.h).
function(d2net_simt target)
  file(GLOB runtime CONFIGURE_DEPENDS "${D2NET_TESTS}/simt/*.cpp")
  set_source_files_properties(${runtime} PROPERTIES COMPILE_OPTIONS "-fno-sanitize=thread" SKIP_PRECOMPILE_HEADERS ON)
  # A .cu is CUDA to CMake unless told otherwise.
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-Wno-unknown-pragmas")
  target_sources(${target} PRIVATE ${ARGN} ${runtime})
  target_include_directories(${target} PRIVATE "${D2NET_ROOT}/csrc" "${D2NET_TESTS}")
  target_compile_definitions(${target} PRIVATE D2NET_SIMT)
endfunction()

file(GLOB D2NET_KERNELS CONFIGURE_DEPENDS "${D2NET_ROOT}/csrc/cuda/*.cu")
