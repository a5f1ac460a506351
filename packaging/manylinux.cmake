# For CMAKE_TOOLCHAIN_FILE: the module runs wherever glibc is 2.28 or newer (manylinux_2_28, as PyTorch's wheels), with
# whatever libstdc++ is there. The machine's own compilers compile; the linker of Zig (pip install ziglang), which knows
# the symbols of every glibc, links. libstdc++ goes into the module, and none of its symbols comes out.
if(NOT DEFINED CACHE{D2NET_ZIG})
  set(D2NET_ZIG "zig" CACHE FILEPATH "Zig's program")
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES D2NET_ZIG)

foreach(library libstdc++.a libgcc.a libgcc_s.so.1)
  execute_process(COMMAND c++ -print-file-name=${library} OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(APPEND D2NET_RUNTIME " ${path}")
endforeach()
string(CONCAT CMAKE_CXX_CREATE_SHARED_MODULE
  "${D2NET_ZIG} c++ -target x86_64-linux-gnu.2.28 -shared -nostdlib++ -Wl,--gc-sections -Wl,-z,relro "
  "-Wl,--version-script=${CMAKE_CURRENT_LIST_DIR}/exports.map -o <TARGET> <OBJECTS> "
  "${CMAKE_CURRENT_LIST_DIR}/newer_glibc.c <LINK_LIBRARIES> -lm${D2NET_RUNTIME}")
