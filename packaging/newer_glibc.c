// Of glibc 2.32: libstdc++ asks it whether locks may be left out. False is always right.
char __libc_single_threaded = 0;
