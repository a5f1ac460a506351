# d2net_simt_kernels(target): adds every CUDA kernel, compiled as C++ against csrc/simt.
# `-fsanitize=thread` goes to the kernels through their target; the runtime itself is not instrumented (simt.cpp).
get_filename_component(D2NET_CSRC "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
function(d2net_simt_kernels target)
  file(GLOB kernels CONFIGURE_DEPENDS "${D2NET_CSRC}/cuda/*.cu")
  d2net_simt_sources(${target} ${kernels} "${D2NET_CSRC}/simt/simt.cpp")
endfunction()

# The same for given files (a .cu is CUDA to CMake unless told otherwise).
function(d2net_simt_sources target)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-Wno-unknown-pragmas")
  set_source_files_properties("${D2NET_CSRC}/simt/simt.cpp" PROPERTIES COMPILE_OPTIONS "-fno-sanitize=thread")
  target_sources(${target} PRIVATE ${ARGN})
  target_include_directories(${target} PRIVATE "${D2NET_CSRC}")
  target_compile_definitions(${target} PRIVATE D2NET_SIMT)
endfunction()
