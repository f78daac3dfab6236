#include "driver.h"

#include <string.h>

#include "platform.h"

/* cuLibraryLoadData and the context-free kernels came with CUDA 12.0. */
#define MIN_DRIVER_VERSION 12000

int fa_driver_check(struct fa_driver *driver, CUresult result, const char *call)
{
    if (result == CUDA_SUCCESS)
        return 0;
    const char *name = NULL, *text = NULL;
    if (driver->cuGetErrorName(result, &name) != CUDA_SUCCESS ||
        driver->cuGetErrorString(result, &text) != CUDA_SUCCESS)
        name = text = "unknown error";
    const char *hint = result == CUDA_ERROR_NOT_INITIALIZED
                           ? "; CUDA does not survive a fork: start worker processes with \"spawn\""
                           : "";
    PyErr_Format(PyExc_RuntimeError, "%s failed: %s (%s, error %d)%s", call, text, name, result,
                 hint);
    return -1;
}

static int load_symbols(struct fa_driver *driver, void *library, const char *path)
{
    const char *missing = NULL;
#define FA_LOAD(entry, symbol, parameters)                                                         \
    *(void **)&driver->entry = fa_library_symbol(library, symbol);                                 \
    if (!driver->entry && !missing)                                                                \
        missing = symbol;
    FA_DRIVER_FUNCTIONS(FA_LOAD)
#undef FA_LOAD
    if (!driver->cuInit || !driver->cuDriverGetVersion) {
        PyErr_Format(PyExc_RuntimeError, "%.100s is not a CUDA driver: no symbol %s", path,
                     missing);
        return -1;
    }
    int version = 0;
    driver->cuDriverGetVersion(&version);
    if (version < MIN_DRIVER_VERSION) {
        PyErr_Format(PyExc_RuntimeError,
                     "the NVIDIA driver supports CUDA %d.%d; at least CUDA %d.%d is needed: update "
                     "the driver",
                     version / 1000, version % 1000 / 10, MIN_DRIVER_VERSION / 1000,
                     MIN_DRIVER_VERSION % 1000 / 10);
        return -1;
    }
    if (missing) {
        PyErr_Format(PyExc_RuntimeError, "%.100s is not a usable CUDA driver: no symbol %s", path,
                     missing);
        return -1;
    }
    driver->version = version;
    return 0;
}

/* Of two transfers in a clock. Some drivers do not tell: that of the architecture then. */
static int dram_gbs_of(const struct fa_driver *driver, const struct fa_cuda_device *cuda)
{
    int khz = 0, bits = 0;
    if (driver->cuDeviceGetAttribute(&khz, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, cuda->handle) ||
        driver->cuDeviceGetAttribute(&bits, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH,
                                     cuda->handle) ||
        khz <= 0 || bits <= 0)
        return fa_device_of_arch(cuda->device.arch).dram_gbs;
    return (int)(2 * khz * (bits / 8LL) / 1000000);
}

static int read_device(struct fa_driver *driver, int ordinal)
{
    struct fa_cuda_device *cuda = &driver->devices[ordinal];
    struct fa_device *device = &cuda->device;
    int major, minor;
    if (FA_DRIVER_CALL(driver, cuDeviceGet, (&cuda->handle, ordinal)) < 0 ||
        FA_DRIVER_CALL(driver, cuDeviceGetName, (cuda->name, sizeof cuda->name, cuda->handle)) < 0)
        return -1;
    const struct {
        int attribute, *value;
    } wanted[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &device->sms},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &device->smem_per_block},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, &device->smem_per_sm},
        {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, &device->l2_bytes},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (FA_DRIVER_CALL(driver, cuDeviceGetAttribute,
                           (wanted[i].value, wanted[i].attribute, cuda->handle)) < 0)
            return -1;
    device->arch = major * 10 + minor;
    device->has_tma = major >= 9;
    device->has_block_scales = major == 12;
    device->dram_gbs = dram_gbs_of(driver, cuda);
    device->kind = fa_device_kind_of_name(cuda->name, device->arch);
    device->kind_reason = FA_KIND_BY_NAME;
    return 0;
}

static int read_devices(struct fa_driver *driver)
{
    if (FA_DRIVER_CALL(driver, cuInit, (0)) < 0 ||
        FA_DRIVER_CALL(driver, cuDeviceGetCount, (&driver->device_count)) < 0)
        return -1;
    if (driver->device_count > FA_MAX_DEVICES)
        driver->device_count = FA_MAX_DEVICES;
    for (int i = 0; i < driver->device_count; i++)
        if (read_device(driver, i) < 0)
            return -1;
    return 0;
}

int fa_driver_open(struct fa_driver *driver, const char *path)
{
    if (driver->library)
        return 0;
    char reason[512];
    const bool is_named = path && *path;
    path = is_named ? path : FA_CUDA_DRIVER_NAME;
    void *library = fa_library_open(path, reason, sizeof reason);
    if (!library) {
        const size_t length = strlen(path),
                     kept = length > 80 ? 80 : length; /* the name, at its end */
        PyErr_Format(PyExc_RuntimeError, "no CUDA driver: %s%s cannot be opened (%.80s)",
                     kept < length ? "..." : "", path + length - kept, reason);
        return -1;
    }
    if (load_symbols(driver, library, path) < 0 || read_devices(driver) < 0)
        return -1;
    driver->library = library;
    driver->takes_ptx = is_named;
    return 0;
}

struct fa_cuda_device *fa_driver_device(struct fa_driver *driver, int ordinal)
{
    if (ordinal >= 0 && ordinal < driver->device_count)
        return &driver->devices[ordinal];
    PyErr_Format(PyExc_ValueError, "there is no CUDA device %d; the driver has %d", ordinal,
                 driver->device_count);
    return NULL;
}

int fa_driver_enter(struct fa_driver *driver, struct fa_cuda_device *device, bool *pushed)
{
    CUcontext current;
    *pushed = false;
    if (!device->context &&
        FA_DRIVER_CALL(driver, cuDevicePrimaryCtxRetain, (&device->context, device->handle)) < 0)
        return -1;
    if (FA_DRIVER_CALL(driver, cuCtxGetCurrent, (&current)) < 0)
        return -1;
    if (current == device->context)
        return 0;
    if (FA_DRIVER_CALL(driver, cuCtxPushCurrent, (device->context)) < 0)
        return -1;
    *pushed = true;
    return 0;
}

int fa_driver_is_capturing(struct fa_driver *driver, CUstream stream)
{
    int status;
    if (FA_DRIVER_CALL(driver, cuStreamIsCapturing, (stream, &status)) < 0)
        return -1;
    return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

void fa_driver_leave(struct fa_driver *driver, bool pushed)
{
    CUcontext popped;
    if (pushed)
        driver->cuCtxPopCurrent(&popped);
}
