// A libcuda.so.1 for machines without a GPU: every call succeeds and does nothing, and launches can be read back.
//
// Triton's own C launcher is linked with it, so that host code runs as on a GPU up to the driver.

#include <cuda.h>
#include <string.h>

#define STUB(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

static int n_functions = 0;

STUB(cuInit, unsigned flags)
STUB(cuCtxSetCurrent, CUcontext context)
STUB(cuCtxSetLimit, CUlimit limit, size_t value)
STUB(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
STUB(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
STUB(cuModuleUnload, CUmodule module)

CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "an error of the stub", CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
// Each function has a handle of its own, by which its launches can be told from others'.
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)(long)++n_functions, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
  return *n = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  return *(CUdeviceptr *)data = address, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 1, CUDA_SUCCESS;
}

// The 128 bytes of a tensor map hold the arguments it was made from: an address, a kind, sizes, strides and a box.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  cuuint64_t *words = memset(map, 0, sizeof(CUtensorMap));
  *words++ = (cuuint64_t)address;
  *words++ = type | rank << 8 | interleave << 12 | swizzle << 16 | promotion << 20 | fill << 24;
  for (cuuint32_t axis = 0; axis < rank; ++axis) {
    *words++ = sizes[axis];
    *words++ = axis + 1 < rank ? strides[axis] : 0;
    *words++ = box[axis];
  }
  return CUDA_SUCCESS;
}

// --- launches -------------------------------------------------------------------------------------------------------

enum { MOST_FUNCTIONS = 4096, MOST_PARAMETERS = 128, MOST_BYTES = 1 << 16 };

static struct {
  int n, bytes[MOST_PARAMETERS];
} parameters_of[MOST_FUNCTIONS];
static unsigned char heard[MOST_BYTES];
static int n_heard;

// From now on record launches of a function, whose parameters have these sizes.
void listen(long function, int n_parameters, const int *bytes) {
  parameters_of[function].n = n_parameters;
  memcpy(parameters_of[function].bytes, bytes, n_parameters * sizeof(int));
}

// What the driver was told by the recorded launches since the last call, in bytes; returns how many.
int hear(unsigned char *bytes) {
  int n = n_heard;
  memcpy(bytes, heard, n);
  n_heard = 0;
  return n;
}

int functions_loaded(void) { return n_functions; }

static void note(const void *data, int n) {
  if (n_heard + n > MOST_BYTES) n_heard = 0;
  memcpy(heard + n_heard, data, n);
  n_heard += n;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  long number = (long)function;
  if (number >= MOST_FUNCTIONS || !parameters_of[number].n) return CUDA_SUCCESS;
  note(&number, sizeof number);
  note(&config->gridDimX, 7 * sizeof(unsigned));  // grid, block, shared memory
  note(&config->hStream, sizeof(CUstream));
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    note(&config->attrs[i].id, sizeof(int));
    note(&config->attrs[i].value, sizeof(int));
  }
  for (int i = 0; i < parameters_of[number].n; ++i) note(parameters[i], parameters_of[number].bytes[i]);
  return CUDA_SUCCESS;
}
