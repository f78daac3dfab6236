/* Variant -> loaded kernel: a hash table; Python compiles on a miss. */
#ifndef FA_KERNEL_TABLE_H
#define FA_KERNEL_TABLE_H

#include "driver.h"
#include "variant.h"

struct fa_kernel_entry {
    struct fa_variant variant;
    int ordinal; /* of the device it is loaded for */
    CUlibrary library;
    CUkernel kernel; /* NULL: the slot is free */
};

struct fa_kernel_table {
    struct fa_kernel_entry *entries; /* open addressing, a power of two, at most half full */
    size_t capacity, count;
    PyObject *package; /* its name; the module's state owns it */
    PyObject *jit;     /* jit.py, imported when first needed */
};

/* The kernel of `variant` on device `ordinal`, whose context is current, for launches that ask for
 * up to `smem_request` bytes of shared memory; compiled and loaded where it is not yet, which a
 * stream under capture does not allow. NULL with the exception set. */
CUkernel fa_kernel_table_get(struct fa_kernel_table *table, struct fa_driver *driver,
                             const struct fa_variant *variant, int smem_request, int ordinal,
                             CUstream stream);

/* The compiler's options of a variant: a tuple of str. NULL with the exception set. */
PyObject *fa_variant_options(const struct fa_variant *variant);

/* Unloads everything. */
void fa_kernel_table_clear(struct fa_kernel_table *kernels, struct fa_driver *driver);

#endif
