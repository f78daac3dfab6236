/* FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv) over a key that consists of ints. */
#ifndef FA_HASH_H
#define FA_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline size_t fa_hash(const void *key, size_t size, unsigned seed)
{
    uint64_t hash = 0xcbf29ce484222325u ^ seed;
    for (size_t i = 0; i < size; i += sizeof(uint32_t)) {
        uint32_t word;
        memcpy(&word, (const char *)key + i, sizeof word);
        hash = (hash ^ word) * 0x100000001b3u;
    }
    return (size_t)(hash ^ hash >> 32);
}

#endif
