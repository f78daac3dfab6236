/* The DLPack 1.3 ABI (https://dmlc.github.io/dlpack), as much of it as a consumer needs. */
#ifndef FA_DLPACK_H
#define FA_DLPACK_H

#include <stdint.h>

#define DLPACK_MAJOR_VERSION                                                                       \
    1 /* another major means another layout: touch nothing but the deleter */

typedef struct {
    uint32_t major, minor;
} DLPackVersion;

/* Device types */
enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 };

/* Type codes of DLDataType */
enum {
    kDLInt = 0,
    kDLUInt = 1,
    kDLFloat = 2,
    kDLBfloat = 4,
    kDLComplex = 5,
    kDLBool = 6,
    kDLFloat8_e4m3fn = 10
};

typedef struct {
    int32_t device_type, device_id;
} DLDevice;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL from producers before 1.2: compact, row-major */
    uint64_t byte_offset;
} DLTensor;

/* Capsule "dltensor": producers from before version 1.0 */
typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

#define DLPACK_FLAG_BITMASK_READ_ONLY 1u

/* Capsule "dltensor_versioned" */
typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

/* Capsule "dlpack_exchange_api", found at type(x).__dlpack_c_exchange_api__: tensors without Python
 * calls. It lives as long as the process. */
typedef struct DLPackExchangeAPI {
    DLPackVersion version;
    struct DLPackExchangeAPI *prev_api; /* the same for an older major version, or NULL */
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out,
                                    void *error_context,
                                    void (*set_error)(void *context, const char *kind,
                                                      const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out_object);
    int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out); /* borrowed; may be NULL */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} DLPackExchangeAPI;

#endif
