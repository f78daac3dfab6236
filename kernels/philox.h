/* The random numbers of dropout: Philox4x32 of Salmon et al., "Parallel Random Numbers: As Easy as
 * 1, 2, 3", 2011, in the seven rounds that pass BigCrush. Plain C, like params.h: the CPU drops
 * what the kernels drop.
 *
 * What is dropped is a function of seed, offset, batch, head, query and key alone:
 *
 *   stream  (seed, offset, batch, head) -> 128 bits, where the counters of a head begin
 *   draw    stream ^ (query, key, 0, 0) -> 8 numbers of 16 bits, for the weights of 2 queries and 4
 *           keys: bit 3 of a query and bits 3 and 4 of a key tell which
 *
 * A lane has all of these weights in its registers, in the forward, where rows are queries, and in
 * the backward, where rows are keys: none draws what another one needs. */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#ifdef __CUDACC_RTC__
#define FA_INLINE __device__ __forceinline__
#else
#define FA_INLINE static inline
#endif

struct fa_philox {
    unsigned word[4];
};

/* How far the queries of a draw are apart, and its keys, and how many keys it has. */
enum { FA_DRAW_QUERY_STEP = 8, FA_DRAW_KEY_STEP = 8, FA_DRAW_KEYS = 4 };

FA_INLINE struct fa_philox fa_philox4x32(struct fa_philox counter, unsigned key0, unsigned key1)
{
    enum { ROUNDS = 7 };
#ifdef __CUDACC_RTC__
#pragma unroll
#endif
    for (int i = 0; i < ROUNDS; i++) {
        const unsigned long long a = 0xd2511f53ull * counter.word[0];
        const unsigned long long b = 0xcd9e8d57ull * counter.word[2];
        const struct fa_philox next = {{(unsigned)(b >> 32) ^ counter.word[1] ^ key0, (unsigned)b,
                                        (unsigned)(a >> 32) ^ counter.word[3] ^ key1, (unsigned)a}};
        counter = next;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return counter;
}

/* `seed` has four words: seed and offset, the lower half of each first. */
FA_INLINE struct fa_philox fa_dropout_stream(const unsigned seed[4], int batch, int head)
{
    const struct fa_philox counter = {{seed[2], seed[3], (unsigned)batch, (unsigned)head}};
    return fa_philox4x32(counter, seed[0], seed[1]);
}

/* The draw of the first of its queries and the first of its keys. A constant key takes no register,
 * and no counter of a stream is one of another's but by chance. */
FA_INLINE struct fa_philox fa_dropout_draw(const struct fa_philox *stream, int query, int key)
{
    struct fa_philox counter = *stream;
    counter.word[0] ^= (unsigned)query;
    counter.word[1] ^= (unsigned)key;
    return fa_philox4x32(counter, 0, 0);
}

/* Whether a weight is kept: query and key number `q` and `k` of a draw. `threshold` is 2^32 times
 * the probability that it is not, a multiple of 2^16. */
FA_INLINE int fa_dropout_keeps(const struct fa_philox *draw, int q, int k, unsigned threshold)
{
    return (q ? draw->word[k] : draw->word[k] << 16) >= threshold;
}

#endif
