// D2NET_HD marks inline maths that CPU and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define D2NET_HD __host__ __device__
#else
#define D2NET_HD
#endif
