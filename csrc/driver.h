/* The CUDA driver, opened at the first CUDA call; its ABI as much as the package uses. */
#ifndef FA_DRIVER_H
#define FA_DRIVER_H

#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels/params.h"
#include "device.h"

/* ---- ABI (CUDA Driver API reference, 12.x) --------------------------------------------------- */

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct CUstream_st *CUstream;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_NOT_INITIALIZED = 3,

    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36,
    CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37,
    CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,

    CU_STREAM_CAPTURE_STATUS_NONE = 0,

    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,

    CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
    CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
    CU_TENSOR_MAP_SWIZZLE_32B = 1,
    CU_TENSOR_MAP_SWIZZLE_64B = 2,
    CU_TENSOR_MAP_SWIZZLE_128B = 3,
    CU_TENSOR_MAP_L2_PROMOTION_128B = 2,
    CU_TENSOR_MAP_OOB_FILL_ZEROS = 0, /* ..._FLOAT_OOB_FILL_NONE in cuda.h */
};

/* Of a launch; the value is a union of 64 bytes. */
typedef struct {
    FA_ALIGNED(8) int id;
    FA_ALIGNED(8) union {
        char bytes[64];
        int programmatic_stream_serialization;
    } value;
} CUlaunchAttribute;

FA_STATIC_ASSERT(sizeof(CUlaunchAttribute) == 72, "cuda.h: an id, padded to 8 bytes, and 64");

typedef struct {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    CUstream stream;
    CUlaunchAttribute *attributes;
    unsigned attribute_count;
} CUlaunchConfig;

/* X(entry point, exported symbol, parameters); all return CUresult */
#define FA_DRIVER_FUNCTIONS(X)                                                                     \
    X(cuInit, "cuInit", (unsigned flags))                                                          \
    X(cuDriverGetVersion, "cuDriverGetVersion", (int *version))                                    \
    X(cuGetErrorName, "cuGetErrorName", (CUresult error, const char **name))                       \
    X(cuGetErrorString, "cuGetErrorString", (CUresult error, const char **text))                   \
    X(cuDeviceGetCount, "cuDeviceGetCount", (int *count))                                          \
    X(cuDeviceGet, "cuDeviceGet", (CUdevice * device, int ordinal))                                \
    X(cuDeviceGetName, "cuDeviceGetName", (char *name, int size, CUdevice device))                 \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device))  \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain",                                        \
      (CUcontext * context, CUdevice device))                                                      \
    X(cuCtxGetCurrent, "cuCtxGetCurrent", (CUcontext * context))                                   \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext context))                                \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext * context))                                \
    X(cuStreamIsCapturing, "cuStreamIsCapturing", (CUstream stream, int *status))                  \
    X(cuStreamSynchronize, "cuStreamSynchronize", (CUstream stream))                               \
    X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2",                                                   \
      (void *host, uintptr_t device, size_t size, CUstream stream))                                \
    X(cuLibraryLoadData, "cuLibraryLoadData",                                                      \
      (CUlibrary * library, const void *code, int *jit_options, void **jit_values,                 \
       unsigned jit_count, int *options, void **values, unsigned count))                           \
    X(cuLibraryUnload, "cuLibraryUnload", (CUlibrary library))                                     \
    X(cuLibraryGetKernel, "cuLibraryGetKernel",                                                    \
      (CUkernel * kernel, CUlibrary library, const char *name))                                    \
    X(cuKernelGetFunction, "cuKernelGetFunction", (void **function, CUkernel kernel))              \
    X(cuKernelSetAttribute, "cuKernelSetAttribute",                                                \
      (int attribute, int value, CUkernel kernel, CUdevice device))                                \
    X(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                            \
      (struct fa_tensor_map * map, int data_type, unsigned rank, void *address,                    \
       const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,                        \
       const uint32_t *element_strides, int interleave, int swizzle, int l2_promotion,             \
       int oob_fill))                                                                              \
    X(cuLaunchKernelEx, "cuLaunchKernelEx",                                                        \
      (const CUlaunchConfig *config, CUkernel kernel, void **parameters, void **extra))

/* ---- what the package makes of it ------------------------------------------------------------ */

#define FA_MAX_DEVICES 64

struct fa_cuda_device {
    struct fa_device device;
    CUdevice handle;
    CUcontext context; /* the primary one, which PyTorch uses; retained at the first launch */
    char name[128];
};

struct fa_driver {
    void *library;  /* NULL until opened */
    int version;    /* 13000 is CUDA 13.0 */
    bool takes_ptx; /* a library in place of the driver: it is given PTX, not machine code */
    int device_count;
    struct fa_cuda_device devices[FA_MAX_DEVICES];
#define FA_POINTER(entry, symbol, parameters) CUresult(*entry) parameters;
    FA_DRIVER_FUNCTIONS(FA_POINTER)
#undef FA_POINTER
};

/* Opens the driver at `path` (NULL or "": the installed one) and reads its devices; does nothing
 * where that is done. 0, or -1 with RuntimeError set: no driver, or too old a one. */
int fa_driver_open(struct fa_driver *driver, const char *path);

/* Device `ordinal` of the opened driver. NULL with ValueError set where there is none. */
struct fa_cuda_device *fa_driver_device(struct fa_driver *driver, int ordinal);

/* Makes the primary context of `device` current. *pushed says whether fa_driver_leave must undo it.
 */
int fa_driver_enter(struct fa_driver *driver, struct fa_cuda_device *device, bool *pushed);
void fa_driver_leave(struct fa_driver *driver, bool pushed);

/* Whether the stream is under graph capture: 1, 0, or -1 with the exception set. */
int fa_driver_is_capturing(struct fa_driver *driver, CUstream stream);

/* 0 for CUDA_SUCCESS, else -1 with RuntimeError "call: NAME (text)" set. */
int fa_driver_check(struct fa_driver *driver, CUresult result, const char *call);

/* Calls an entry point of the driver: 0, or -1 with the exception set. */
#define FA_DRIVER_CALL(driver, call, arguments)                                                    \
    fa_driver_check(driver, (driver)->call arguments, #call)

#endif
