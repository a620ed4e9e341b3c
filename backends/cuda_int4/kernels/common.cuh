// What all kernels need of the machine. No header is included: NVRTC has none.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum class Body { S4, NIBBLE, HALF };                  // what is multiplied: 4-bit codes, bytes, f16
enum class Rows { ONE, STEP, TOKEN };                  // parameters: one; of the step; of each row of the input
enum class Bias { NONE, ONE, STEP };                   // no bias, one row, or the step's row of a table
enum class Activation { NONE, SILU, GELU, GELU_TANH, GEGLU };
enum class Out { F16, U4, U8, S32 };                   // S32: the exact sums, for tests

// The body for 4-bit codes of the chip that is compiled for: one text then serves a binary for several of them. Chips
// after sm_89 have no 4-bit products, and emulate them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr Body BODY_OF_CHIP = Body::NIBBLE;
#else
constexpr Body BODY_OF_CHIP = Body::S4;
#endif

namespace machine {

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// threadIdx.x, which the compiler then does not keep in a register from one use to a far one.
__device__ __forceinline__ u32 thread() {
  u32 x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// 16 bytes from global to shared memory; zeros where `valid` is false, and nothing is read.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// By those threads only for which `copies` is true; others neither read nor write.
__device__ __forceinline__ void copy_async_if(bool copies, u32 to, const void* from, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "{\n\t"
      ".reg .pred copies;\n\t"
      "setp.ne.s32 copies, %3, 0;\n\t"
      "@copies cp.async.cg.shared.global [%0], [%1], 16, %2;\n\t"
      "}" ::"r"(to), "l"(from), "r"(bytes), "r"((int)copies)
      : "memory");
}

__device__ __forceinline__ void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of the thread's newest groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 16 byte matrices: lane i gives the address of row i % 8 of matrix i / 8, and receives of each matrix the
// bytes 4 * (lane % 4) .. + 3 of row lane / 4.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void load_shared(u32 (&to)[4], u32 from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// As one of 16 bytes, but of twice 8.
__device__ __forceinline__ void load_shared(u32 (&to)[4], u32 first, u32 second) {
  asm volatile(
      "ld.shared.v2.u32 {%0, %1}, [%4];\n\t"
      "ld.shared.v2.u32 {%2, %3}, [%5];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(first), "r"(second)
      : "memory");
}

// 8 and 16 bytes of what no kernel writes. The compiler leaves assembly where it stands.
__device__ __forceinline__ void load_global(u32& first, u32& second, const void* from) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "l"(from));
}

__device__ __forceinline__ void load_global(u32 (&to)[4], const void* from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}

// The same where `valid` is true, else zeros.
__device__ __forceinline__ void load_global_if(bool valid, u32& first, u32& second, const void* from) {
  asm volatile(
      "{\n\t"
      ".reg .pred valid;\n\t"
      "setp.ne.s32 valid, %3, 0;\n\t"
      "mov.u32 %0, 0;\n\t"
      "mov.u32 %1, 0;\n\t"
      "@valid ld.global.nc.v2.u32 {%0, %1}, [%2];\n\t"
      "}"
      : "=&r"(first), "=&r"(second)
      : "l"(from), "r"((int)valid));
}

// acc [16, 8] += a [16, 64] b [64, 8]; 4-bit codes, eight a register, the lowest k in the lowest bits.
__device__ __forceinline__ void multiply_u4s4(int (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc [16, 8] += a [16, 32] b [32, 8]; 8-bit codes, four a register.
__device__ __forceinline__ void multiply_u8s8(int (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc [16, 8] += a [16, 16] b [16, 8]; f16, two a register. How a chip rounds within one instruction is its own.
__device__ __forceinline__ void multiply_f16(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two f16 at once.
__device__ __forceinline__ u32 multiply_halves(u32 x, u32 y) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  return product;
}

// Signed 4-bit codes 0 and 4 of a register, then 1 and 5, as two f16 each: with its sign flipped, a code is 8 more, and
// 0x6400 | n is 1024 + n in f16.
__device__ __forceinline__ void expand_codes(u32 (&to)[2], u32 x) {
  u32 low, high;  // x & mask ^ number, which the compiler makes two instructions of
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(low) : "r"(x), "r"(0x000F000Fu), "r"(0x64086408u));
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(high) : "r"(x), "r"(0x00F000F0u), "r"(0x64806480u));
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(to[0]) : "r"(low), "r"(0x64086408u));                        // 1032
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(to[1]) : "r"(high), "r"(0x2C002C00u), "r"(0xD480D480u));  // 1 / 16, -72
}

// 16 times the low and the high 4-bit codes of a register's bytes, as bytes: signed ones keep their sign.
__device__ __forceinline__ u32 low_codes(u32 x) { return (x << 4) & 0xF0F0F0F0u; }
__device__ __forceinline__ u32 high_codes(u32 x) { return x & 0xF0F0F0F0u; }

// Each one instruction: numbers that are not normal are taken as zero.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(u16 half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

// Two f16, each rounded to the nearest even; `low` at the lower address.
__device__ __forceinline__ u32 to_halves(float low, float high) {
  u32 x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// N f16 to an address that is aligned to all of them.
template <int N>
__device__ __forceinline__ void store_halves(u16* to, const float (&y)[N]) {
  static_assert(N == 4 || N == 8, "one store");
  if constexpr (N == 8) {
    *(uint4*)to = {to_halves(y[0], y[1]), to_halves(y[2], y[3]), to_halves(y[4], y[5]), to_halves(y[6], y[7])};
  } else {
    *(uint2*)to = {to_halves(y[0], y[1]), to_halves(y[2], y[3])};
  }
}

}  // namespace machine

// Codes of values: clamp(rint(y * inverse) + zero, 0, 2^BITS - 1), rint to the nearest even. Clamping before adding the
// zero point is the same, since its bounds are integers, and keeps values in the range of the trick below; NaN gives 0.
namespace codes {

template <int BITS>
__device__ __forceinline__ u32 quantize(float y, float inverse, int zero) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: floats there are 1 apart, so the sum is rounded to an integer
  constexpr int MAGIC_BITS = 0x4B400000;
  const float low = (float)-zero, high = (float)((1 << BITS) - 1 - zero);
  const float bounded = fminf(fmaxf(__fmul_rn(y, inverse), low), high);
  return (u32)(__float_as_int(__fadd_rn(bounded, MAGIC)) - MAGIC_BITS + zero);
}

// Stores N codes, of 4 bits (two a byte, the first in the low half) or 8, in one store.
template <int BITS, int N>
__device__ __forceinline__ void store(u8* to, const u32 (&q)[N]) {
  static_assert(N == 4 || N == 8, "one store");
  u32 words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < N; ++i) words[i * BITS / 32] |= q[i] << i * BITS % 32;
  if constexpr (N * BITS == 64) {
    *(uint2*)to = {words[0], words[1]};
  } else if constexpr (N * BITS == 32) {
    *(u32*)to = words[0];
  } else {
    *(u16*)to = (u16)words[0];
  }
}

}  // namespace codes
