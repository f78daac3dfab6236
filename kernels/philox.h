/* The random numbers of dropout: Philox of Salmon et al., "Parallel Random Numbers: As Easy as
 * 1, 2, 3", 2011, in seven rounds. Plain C, like params.h: the CPU drops what the kernels drop.
 *
 * What is dropped is a function of seed, offset, batch, head, query and key alone:
 *
 *   stream  Philox4x32 of (seed, offset, batch, head): the key of a head, and where its counters
 *           begin
 *   draw    Philox2x32 of the counter (query, key): 8 bytes, for the weights of 2 queries and 4
 *           keys: bit 3 of a query and bits 3 and 4 of a key tell which
 *
 * A weight is dropped if its byte is below the threshold, which has 16 bits. Their lower half
 * counts where the byte equals the upper one, in one weight of 256: there all weights of a draw
 * compare the same 8 bits, of the counter before the last round. So two weights of a draw
 * correlate, by less than 2^-18 / (p (1 - p)).
 *
 * A lane has all of these weights in its registers, in the forward, where rows are queries, and in
 * the backward, where rows are keys: none draws what another one needs. Eight bytes are compared as
 * two words, and their results make masks of the 16-bit weights: one PRMT for two. */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#ifdef __CUDACC_RTC__
#define FA_INLINE __device__ __forceinline__
#define FA_UNROLL _Pragma("unroll")
#else
#define FA_INLINE static inline
#define FA_UNROLL
#endif

/* How far the queries of a draw are apart, and its keys, and how many keys it has. */
enum { FA_DRAW_QUERY_STEP = 8, FA_DRAW_KEY_STEP = 8, FA_DRAW_KEYS = 4, FA_PHILOX_ROUNDS = 7 };

/* 1 in each byte of a word, and its upper bit. */
#define FA_BYTE_ONES  0x01010101u
#define FA_BYTE_SIGNS 0x80808080u

struct fa_dropout_stream {
    unsigned counter[2], key;
};

/* Of query q and key k the upper bit of byte k of word q: whether the weight is kept. */
struct fa_dropout_draw {
    unsigned word[2];
};

/* `seed` has four words: seed and offset, the lower half of each first. */
FA_INLINE struct fa_dropout_stream fa_dropout_stream_of(const unsigned seed[4], int batch, int head)
{
    unsigned word[4] = {seed[2], seed[3], (unsigned)batch, (unsigned)head};
    FA_UNROLL
    for (unsigned i = 0; i < FA_PHILOX_ROUNDS; i++) {
        const unsigned long long a = 0xd2511f53ull * word[0], b = 0xcd9e8d57ull * word[2];
        word[0] = (unsigned)(b >> 32) ^ word[1] ^ (seed[0] + i * 0x9e3779b9u);
        word[1] = (unsigned)b;
        word[2] = (unsigned)(a >> 32) ^ word[3] ^ (seed[1] + i * 0xbb67ae85u);
        word[3] = (unsigned)a;
    }
    const struct fa_dropout_stream stream = {{word[0], word[1]}, word[2]};
    return stream;
}

/* The draw of the first of its queries and the first of its keys. `threshold` is 2^32 times the
 * probability of a weight to be dropped, a multiple of 2^16. */
FA_INLINE struct fa_dropout_draw fa_dropout_draw_at(const struct fa_dropout_stream *stream,
                                                    int query, int key, unsigned threshold)
{
    unsigned word[2] = {stream->counter[0] ^ (unsigned)query, stream->counter[1] ^ (unsigned)key};
    unsigned tie = 0;
    FA_UNROLL
    for (unsigned i = 0; i < FA_PHILOX_ROUNDS; i++) {
        const unsigned long long product = 0xd256d193ull * word[0];
        tie = word[0];
        word[0] = (unsigned)(product >> 32) ^ word[1] ^ (stream->key + i * 0x9e3779b9u);
        word[1] = (unsigned)product;
    }
    /* In each byte: bits 0 to 6 are compared by a subtraction that borrows from bit 7 alone, then
     * bit 7 is. */
    const unsigned upper = (threshold >> 24) * FA_BYTE_ONES, lower = threshold << 8;
    const unsigned bits = upper & ~FA_BYTE_SIGNS;
    const unsigned limit = tie < lower ? bits + FA_BYTE_ONES : bits;
    struct fa_dropout_draw draw;
    FA_UNROLL
    for (int q = 0; q < 2; q++) {
        const unsigned x = word[q], at_least = (x | FA_BYTE_SIGNS) - limit;
        draw.word[q] = (x & at_least) | ((x | at_least) & ~upper);
    }
    return draw;
}

/* Whether a weight is kept: query and key number `q` and `k` of a draw. */
FA_INLINE int fa_dropout_keeps(const struct fa_dropout_draw *draw, int q, int k)
{
    return draw->word[q] >> (8 * k + 7) & 1;
}

/* The same of any weight. */
FA_INLINE int fa_dropout_keeps_weight(const struct fa_dropout_stream *stream, int query, int key,
                                      unsigned threshold)
{
    enum { QUERY_BIT = FA_DRAW_QUERY_STEP, KEY_BITS = (FA_DRAW_KEYS - 1) * FA_DRAW_KEY_STEP };
    const struct fa_dropout_draw draw =
        fa_dropout_draw_at(stream, query & ~QUERY_BIT, key & ~KEY_BITS, threshold);
    return fa_dropout_keeps(&draw, (query & QUERY_BIT) != 0, (key & KEY_BITS) / FA_DRAW_KEY_STEP);
}

#endif
