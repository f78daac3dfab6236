#include "device_check.h"

#include <stdlib.h>

#include "cpu/block_map.h"
#include "cpu/sequence.h"

/* Fetches the memory of a tensor to the host, and makes it the tensor's. What lies between its
 * elements comes along. */
static CUresult fetch(struct fa_driver *driver, struct fa_tensor *numbers, void *host,
                      CUstream stream)
{
    const uintptr_t begin = numbers->begin, first = (uintptr_t)numbers->data - begin;
    numbers->data = (char *)host + first;
    return driver->cuMemcpyDtoHAsync(host, begin, numbers->end - begin, stream);
}

int fa_device_check(struct fa_driver *driver, const struct fa_problem *problem, CUstream stream)
{
    struct fa_problem copy = *problem; /* of it lengths, pages and lists are read */
    struct fa_tensor *const all[] = {&copy.cu_seqlens_q,
                                     &copy.cu_seqlens_k,
                                     &copy.seqused_q,
                                     &copy.seqused_k,
                                     &copy.page_table,
                                     &copy.leftpad_k,
                                     &copy.key_blocks.counts,
                                     &copy.key_blocks.indices,
                                     &copy.key_blocks.full_counts,
                                     &copy.key_blocks.full_indices,
                                     &copy.query_blocks.counts,
                                     &copy.query_blocks.indices,
                                     &copy.query_blocks.full_counts,
                                     &copy.query_blocks.full_indices};
    enum { COUNT = sizeof all / sizeof *all };
    void *hosts[COUNT] = {0};
    CUresult result = CUDA_SUCCESS;
    int status = fa_driver_is_capturing(driver, stream);
    if (status > 0)
        PyErr_SetString(PyExc_RuntimeError,
                        "FA_SM120_CHECK=1 waits for lengths, which a stream under graph capture "
                        "cannot: capture without it");
    if (status)
        return -1;
    for (int i = 0; i < COUNT; i++) {
        const size_t size = all[i]->object ? all[i]->end - all[i]->begin : 0;
        if (size > 0 && !(hosts[i] = malloc(size))) {
            PyErr_NoMemory();
            status = -1;
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    for (int i = 0; i < COUNT && result == CUDA_SUCCESS; i++)
        if (hosts[i])
            result = fetch(driver, all[i], hosts[i], stream);
    if (result == CUDA_SUCCESS)
        result = driver->cuStreamSynchronize(stream);
    Py_END_ALLOW_THREADS
    status = fa_driver_check(driver, result, "reading lengths for FA_SM120_CHECK");
    if (status == 0)
        status = fa_check_sequences(&copy) < 0 || fa_block_map_check(&copy.key_blocks) < 0 ||
                         fa_block_map_check(&copy.query_blocks) < 0
                     ? -1
                     : 0;
done:
    for (int i = 0; i < COUNT; i++)
        free(hosts[i]);
    return status;
}
