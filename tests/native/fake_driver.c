/* A driver without a GPU: the entry points that launching a kernel needs, which write down what they are given. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE* notes(void) {
  static FILE* file = NULL;
  if (file == NULL) {
    file = fopen(getenv("LOWBIT_FAKE_DRIVER"), "w");
    setvbuf(file, NULL, _IOLBF, 0);
  }
  return file;
}

static int contexts, modules, functions;

int cuInit(unsigned flags) { return flags != 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  fprintf(notes(), "retain %d\n", device);
  return *context = &contexts, 0;
}
int cuCtxSetCurrent(void* context) {
  fprintf(notes(), "enter %d\n", context == &contexts);
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static _Thread_local int current = 0;
  const int before = current;
  fprintf(notes(), "captures %d\n", *mode);
  current = *mode;
  return *mode = before, 0;
}
int cuModuleLoadData(void** module, const void* image) {
  fprintf(notes(), "load %.5s\n", (const char*)image);
  return *module = &modules, 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  fprintf(notes(), "function %s %d\n", name, module == &modules);
  return *function = &functions, 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  fprintf(notes(), "attribute %d %d %d\n", function == &functions, attribute, value);
  return value > 232448 ? 1 : 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  fprintf(notes(), "asked %d %d\n", attribute, function == &functions);
  return *value = 80, 0;
}
/* A pointer, an int, a float and a null pointer. */
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  fprintf(notes(), "launch %d %u %u %u %u %u %u %u %p %p %d %g %d %d\n", function == &functions, gx, gy, gz, bx, by, bz,
          shared, stream, *(void**)parameters[0], *(int*)parameters[1], *(float*)parameters[2],
          *(void**)parameters[3] == NULL, extra == NULL);
  return 0;
}

int cuGetProcAddress_v2(const char* symbol, void** found, int version, uint64_t flags, int* status) {
  static const struct {
    const char* name;
    void* address;
  } known[] = {
      {"cuInit", cuInit},
      {"cuDriverGetVersion", cuDriverGetVersion},
      {"cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain},
      {"cuCtxSetCurrent", cuCtxSetCurrent},
      {"cuModuleLoadData", cuModuleLoadData},
      {"cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode},
      {"cuModuleGetFunction", cuModuleGetFunction},
      {"cuFuncSetAttribute", cuFuncSetAttribute},
      {"cuFuncGetAttribute", cuFuncGetAttribute},
      {"cuLaunchKernel", cuLaunchKernel},
      {"cuGetProcAddress", cuGetProcAddress_v2},
  };
  (void)version, (void)flags;
  *found = NULL;
  for (size_t i = 0; i < sizeof known / sizeof known[0]; ++i)
    if (strcmp(symbol, known[i].name) == 0) *found = known[i].address;
  if (status != NULL) *status = *found == NULL;
  return *found == NULL ? 500 : 0;
}
