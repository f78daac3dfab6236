/* FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv) over a key that consists of ints, two at a
 * time. */
#ifndef FA_HASH_H
#define FA_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t fa_hash_step(uint64_t hash, uint64_t word)
{
    return (hash ^ word ^ word >> 32) * 0x100000001b3u;
}

static inline size_t fa_hash(const void *key, size_t size, unsigned seed)
{
    uint64_t hash = 0xcbf29ce484222325u ^ seed, pair;
    uint32_t last;
    size_t at = 0;
    for (; at + sizeof pair <= size; at += sizeof pair) {
        memcpy(&pair, (const char *)key + at, sizeof pair);
        hash = fa_hash_step(hash, pair);
    }
    if (at < size) {
        memcpy(&last, (const char *)key + at, sizeof last);
        hash = fa_hash_step(hash, last);
    }
    return (size_t)(hash ^ hash >> 32);
}

#endif
