"""Which weights a call drops: kernels/philox.h once more, in torch's integers."""

import torch

ROUNDS = 7
WORD = 0xFFFFFFFF


def multiplied(x, factor):
    """The upper and the lower word of a product of words, within int64."""
    low, high = (factor & 0xFFFF) * x, (factor >> 16) * x
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), (low & 0xFFFF) | (middle & 0xFFFF) << 16


def philox4x32(counter, key, rounds=ROUNDS):
    """Four words of four words, each an int or a tensor of int64."""
    counter = [torch.as_tensor(x, dtype=torch.int64) for x in counter]
    key = list(key)
    for _ in range(rounds):
        (high_a, low_a), (high_b, low_b) = (
            multiplied(counter[0], 0xD2511F53),
            multiplied(counter[2], 0xCD9E8D57),
        )
        counter = [high_b ^ counter[1] ^ key[0], low_b, high_a ^ counter[3] ^ key[1], low_a]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


def philox2x32(counter, key, rounds=ROUNDS):
    """Two words of two words, and the first one before the last round."""
    first, second = (torch.as_tensor(x, dtype=torch.int64) for x in counter)
    before = first
    for _ in range(rounds):
        before = first
        high, low = multiplied(first, 0xD256D193)
        first, second = high ^ second ^ key, low
        key = (key + 0x9E3779B9) & WORD
    return (first, second), before


def kept(seed, dropout_p, batch, heads, queries, keys):
    """[len(batch), heads, queries, keys]: whether a weight counts. `batch`: numbers of sequences."""
    seed, offset = (int(x) & (1 << 64) - 1 for x in seed)
    sequence = torch.tensor(list(batch))[:, None, None, None]
    head = torch.arange(heads)[:, None, None]
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    stream = philox4x32((offset & WORD, offset >> 32, sequence, head), (seed & WORD, seed >> 32))
    counter = (stream[0] ^ (query & ~8), stream[1] ^ (key & ~24))
    words, before = philox2x32(counter, stream[2])
    word = torch.where((query & 8) != 0, words[1], words[0])
    numbers = (word >> (key & 24) & 0xFF) << 8 | before >> 24
    return numbers >= threshold(dropout_p)


def threshold(dropout_p):
    """Of 2^16 numbers so many drop a weight."""
    return min(int(dropout_p * 65536 + 0.5), 65535)


def factors(seed, dropout_p, batch, heads, queries, keys):
    """What weights are multiplied by, in fp64: `dropout` of helpers/reference.py."""
    counts = kept(seed, dropout_p, batch, heads, queries, keys)
    return counts.double() / (1 - threshold(dropout_p) / 65536)
