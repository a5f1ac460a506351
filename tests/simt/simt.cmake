# d2net_simt_kernels(target): adds every CUDA kernel, compiled as C++ against tests/simt.
# `-fsanitize=thread` goes to the kernels through their target; the runtime itself is not instrumented (simt.cpp).
get_filename_component(D2NET_TESTS "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
get_filename_component(D2NET_ROOT "${D2NET_TESTS}" DIRECTORY)
function(d2net_simt_kernels target)
  file(GLOB kernels CONFIGURE_DEPENDS "${D2NET_ROOT}/csrc/cuda/*.cu")
  d2net_simt_sources(${target} ${kernels} "${D2NET_TESTS}/simt/simt.cpp")
endfunction()

# The same for given files (a .cu is CUDA to CMake unless told otherwise).
function(d2net_simt_sources target)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-Wno-unknown-pragmas")
  set_source_files_properties("${D2NET_TESTS}/simt/simt.cpp" PROPERTIES COMPILE_OPTIONS "-fno-sanitize=thread")
  target_sources(${target} PRIVATE ${ARGN})
  target_include_directories(${target} PRIVATE "${D2NET_ROOT}/csrc" "${D2NET_TESTS}")
  target_compile_definitions(${target} PRIVATE D2NET_SIMT)
endfunction()
