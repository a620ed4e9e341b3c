// A libcuda over host memory, for tests. Kernels compute nothing; the environment says what happens instead:
//
//   TFQC_STUB_DEVICES     how many devices there are (1)
//   TFQC_STUB_CAPABILITY  their compute capability (86 is 8.6)
//   TFQC_STUB_FAIL        the entry point that fails, with CUDA_ERROR_LAUNCH_FAILED
//   TFQC_STUB_LOG         a file that gets a line for each launch
//   TFQC_STUB_RESULTS     a directory: a launch of kernel K writes what is in K.0, K.1, .. where arguments 0, 1, .. point
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct { char name[256]; int shared; } Kernel;

static const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}
static int fails(const char* entry) { return strcmp(setting("TFQC_STUB_FAIL", ""), entry) ? 0 : 719; }
static int devices(void) { return atoi(setting("TFQC_STUB_DEVICES", "1")); }

int cuInit(unsigned flags) { return devices() == 0 ? 100 : fails("cuInit"); }
int cuDriverGetVersion(int* version) { return *version = 13020, 0; }
int cuGetErrorName(int error, const char** text) { return *text = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : 0, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "unspecified launch failure", 0; }
int cuDeviceGetCount(int* count) { return *count = devices(), 0; }
int cuDeviceGet(int* device, int index) { return *device = index, index < devices() ? fails("cuDeviceGet") : 101; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "Stub %d", device), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = 8ull << 30, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(size_t)(4096 + device), 0; }
int cuCtxSetCurrent(void* context) { return context ? fails("cuCtxSetCurrent") : 201; }
int cuCtxSynchronize(void) { return fails("cuCtxSynchronize"); }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = atoi(setting("TFQC_STUB_CAPABILITY", "86"));
  switch (attribute) {
    case 13: return *value = 1500000, 0;
    case 16: return *value = 46, 0;
    case 75: return *value = capability / 10, 0;
    case 76: return *value = capability % 10, 0;
  }
  return 1;
}

int cuModuleLoadData(void** module, const void* image) {
  return *module = (void*)image, ((const char*)image)[0] ? fails("cuModuleLoadData") : 200;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  Kernel* kernel = calloc(1, sizeof(Kernel));
  snprintf(kernel->name, sizeof(kernel->name), "%s", name);
  return *function = kernel, fails("cuModuleGetFunction") ? 500 : 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return ((Kernel*)function)->shared = value, attribute == 8 && value <= 99 * 1024 ? 0 : 1;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const Kernel* kernel = function;
  if (parameters || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4]) return 1;
  if (shared > (unsigned)kernel->shared) return 1;
  const char* given = extra[1];
  const size_t pointers = (*(size_t*)extra[3] - sizeof(int)) / sizeof(u64);
  FILE* log = fopen(setting("TFQC_STUB_LOG", "/dev/null"), "a");
  fprintf(log, "%s grid %u %u %u block %u %u %u shared %u stream %zu arguments", kernel->name, x, y, z, tx, ty, tz,
          shared, (size_t)stream);
  for (size_t i = 0; i < pointers; ++i) fprintf(log, " %llu", ((const u64*)given)[i]);
  fprintf(log, " %d\n", *(const int*)(given + pointers * sizeof(u64)));
  fclose(log);
  for (size_t i = 0; i < pointers && getenv("TFQC_STUB_RESULTS"); ++i) {
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s.%zu", getenv("TFQC_STUB_RESULTS"), kernel->name, i);
    FILE* result = fopen(path, "rb");
    if (!result) continue;
    char* to = (char*)((const u64*)given)[i];
    for (size_t some; (some = fread(to, 1, 4096, result)) > 0; to += some) {}
    fclose(result);
  }
  return fails("cuLaunchKernel");
}

int cuMemAlloc_v2(u64* pointer, size_t bytes) {
  return bytes > 8ull << 30 ? 2 : (*pointer = (u64)malloc(bytes), fails("cuMemAlloc_v2"));
}
int cuMemFree_v2(u64 pointer) { return free((void*)pointer), 0; }
int cuMemcpyHtoD_v2(u64 to, const void* from, size_t bytes) { return memcpy((void*)to, from, bytes), 0; }
int cuMemcpyDtoH_v2(void* to, u64 from, size_t bytes) { return memcpy(to, (void*)from, bytes), 0; }
int cuMemsetD8_v2(u64 to, unsigned char byte, size_t bytes) { return memset((void*)to, byte, bytes), 0; }

// An event is the number of microseconds that had passed when it was recorded: 250 more each time.
int cuEventCreate(void** event, unsigned flags) { return *event = calloc(1, sizeof(u64)), 0; }
int cuEventRecord(void* event, void* stream) {
  static u64 now = 0;
  return *(u64*)event = now += 250, 0;
}
int cuEventSynchronize(void* event) { return *(u64*)event ? 0 : 400; }
int cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  return *milliseconds = (*(u64*)end - *(u64*)begin) / 1000.0f, 0;
}
