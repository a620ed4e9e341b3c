// What a debug build (TFQC_KERNEL_CHECKS) asserts of what kernels are told and of the memory that they take; else nothing.
#pragma once

#ifdef TFQC_CHECK
#include <cstdio>
#include <cstdlib>
#define TFQC_ASSERT(it)                                              \
  do {                                                               \
    if (!(it)) {                                                     \
      std::fprintf(stderr, "tfqc kernels: %s does not hold\n", #it); \
      std::abort();                                                  \
    }                                                                \
  } while (false)
#else
#define TFQC_ASSERT(it)
#endif
