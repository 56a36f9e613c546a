/* Pillow's resize(..., BILINEAR, box=...) of RGB, bit for bit: its weights in fixed point, its rounding, first across
 * and then down (Pillow's src/libImaging/Resample.c), but a row at a time, while it is in the cache.
 *
 * A weight has 22 bits, and the products of fewer are the fast ones. So a weight is split, each part is summed by itself,
 * and the sum is exact. AVX2 multiplies 16 bits: 15 bits and what is above them. VNNI multiplies a byte by a signed one,
 * and adds four such products: three signed bytes.
 */
#include "_resize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX2 (vectors >= 1 && __builtin_cpu_supports("avx2"))
#define AVX2 __attribute__((target("avx2")))
#define HAS_VNNI (vectors >= 2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

#define BITS 22
#define HALF (1 << (BITS - 1))
#define LOW 15

int vectors = 2;

void *room_for(Room *room, size_t bytes) {
    if (bytes > room->bytes) {
        free(room->at);
        room->at = calloc(1, bytes);
        room->bytes = room->at == NULL ? 0 : bytes;
    }
    return room->at;
}

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* The pixels that one pixel of the result sees, and their weights. */
static void weigh(Axis *axis, int at, int side, double centre, double reach, double shrink, double *shares) {
    int first = (int)(centre - reach + 0.5), end = (int)(centre + reach + 0.5);
    if (first < 0) first = 0;
    if (first > side - 1) first = side - 1; /* a box that reaches out of the image: none of ours does */
    if (end > side) end = side;
    if (end > first + axis->most) end = first + axis->most;
    if (end < first) end = first;
    double sum = 0.0;
    for (int n = 0; n < end - first; n++) sum += shares[n] = triangle((n + first - centre + 0.5) * shrink);
    for (int n = 0; n < end - first; n++) {
        const double share = sum != 0.0 ? shares[n] / sum : shares[n];
        axis->weight[(size_t)at * axis->most + n] = (int32_t)(0.5 + share * (1 << BITS));
    }
    axis->start[at] = first;
    axis->count[at] = end - first;
}

#ifdef AVX2
/* Up to two pixels of each: two of the result side by side, 32 bytes of lower and 32 of upper parts. More: four pixels
 * of the image side by side for one of the result. Every part stands four times, for R, G, B and X. */
static int pack(Axis *axis) {
    const int groups = (axis->most + 3) / 4, padded = (axis->size + 7) & ~7;
    const size_t values = axis->most <= 2 ? (size_t)padded * 16 : (size_t)padded * groups * 32;
    int16_t *packed = axis->packed = room_for(&axis->packs, values * sizeof *packed);
    if (packed == NULL) return -1;
    memset(packed, 0, values * sizeof *packed);
    for (int at = 0; at < axis->size; at++) {
        for (int n = 0; n < axis->count[at]; n++) {
            const int32_t weight = axis->weight[(size_t)at * axis->most + n];
            int16_t *to = axis->most <= 2 ? packed + at / 2 * 32 + at % 2 * 8 + n
                                          : packed + ((size_t)at * groups + n / 4) * 32 + n % 4 / 2 * 8 + n % 2;
            for (int band = 0; band < 4; band++) {
                to[2 * band] = (int16_t)(weight & ((1 << LOW) - 1));
                to[2 * band + 16] = (int16_t)(weight >> LOW);
            }
        }
    }
    return 0;
}

/* Signed bytes of the weights: of four pixels of the result and four of the image each three times 16 bytes, from the
 * lowest to the highest; byte 4 i + n is that of pixel i of the result and pixel n of the image. */
static int pack_bytes(Axis *axis) {
    int most = 1;
    for (int at = 0; at < axis->size; at++) most = axis->count[at] > most ? axis->count[at] : most;
    axis->groups = (most + 3) / 4;
    const size_t bytes = (size_t)((axis->size + 3) / 4) * axis->groups * 48;
    int8_t *packed = axis->packed = room_for(&axis->packs, bytes);
    if (packed == NULL) return -1;
    memset(packed, 0, bytes);
    for (int at = 0; at < axis->size; at++) {
        const int32_t *weights = axis->weight + (size_t)at * axis->most;
        int8_t *block = packed + (size_t)(at / 4) * axis->groups * 48 + at % 4 * 4;
        for (int n = 0; n < axis->count[at]; n++) {
            int8_t *to = block + n / 4 * 48 + n % 4;
            int32_t weight = weights[n];
            to[0] = (int8_t)(weight & 255);
            weight = (weight - to[0]) >> 8;
            to[16] = (int8_t)(weight & 255);
            to[32] = (int8_t)((weight - to[16]) >> 8);
        }
    }
    return 0;
}
#endif

int axis_set(Axis *axis, int side, float from, float to, int size, int flip) {
    const double scale = (double)(to - from) / size, wide = scale < 1.0 ? 1.0 : scale;
    axis->size = size;
    axis->most = (int)ceil(wide) * 2 + 1;
    if (wide == 1.0) axis->most = 2;
    const size_t padded = ((size_t)size + 7) & ~(size_t)7;
    axis->start = room_for(&axis->starts, padded * sizeof *axis->start);
    axis->count = room_for(&axis->counts, padded * sizeof *axis->count);
    axis->weight = room_for(&axis->weights, (size_t)size * axis->most * sizeof *axis->weight);
    double *shares = room_for(&axis->doubles, (size_t)axis->most * sizeof *shares);
    axis->lines = room_for(&axis->pointers, (size_t)axis->most * sizeof *axis->lines);
    if (axis->start == NULL || axis->count == NULL || axis->weight == NULL || axis->lines == NULL) return -1;
    if (shares == NULL) return -1;
    for (int n = 0; n < size; n++) {
        weigh(axis, flip ? size - 1 - n : n, side, from + (n + 0.5) * scale, wide, 1.0 / wide, shares);
    }
    for (size_t n = size; n < padded; n++) axis->start[n] = axis->start[size - 1];
#ifdef AVX2
    if (HAS_VNNI) return pack_bytes(axis);
    if (HAS_AVX2) return pack(axis);
#endif
    return 0;
}

void axis_free(Axis *axis) {
    Room *rooms[] = {&axis->starts, &axis->counts, &axis->weights, &axis->packs, &axis->doubles, &axis->pointers};
    for (size_t n = 0; n < sizeof rooms / sizeof *rooms; n++) free(rooms[n]->at);
}

int axis_first(const Axis *axis) {
    const int one = axis->start[0], other = axis->start[axis->size - 1];
    return one < other ? one : other;
}

int axis_end(const Axis *axis) {
    const int last = axis->size - 1;
    const int one = axis->start[0] + axis->count[0], other = axis->start[last] + axis->count[last];
    return one > other ? one : other;
}

static Byte limited(int32_t sum) {
    const int32_t value = sum >> BITS;
    return (Byte)(value < 0 ? 0 : value > 255 ? 255 : value);
}

static void across_plainly(const Axis *axis, const Byte *row, int first, Byte *out) {
    for (int at = 0; at < axis->size; at++, out += 3) {
        const Byte *pixel = row + 4 * (ptrdiff_t)(axis->start[at] - first);
        const int32_t *weight = axis->weight + (size_t)at * axis->most;
        int32_t red = HALF, green = HALF, blue = HALF;
        for (int n = 0; n < axis->count[at]; n++, pixel += 4) {
            red += pixel[0] * weight[n];
            green += pixel[1] * weight[n];
            blue += pixel[2] * weight[n];
        }
        out[0] = limited(red);
        out[1] = limited(green);
        out[2] = limited(blue);
    }
}

static void down_plainly(const Byte *const *lines, const int32_t *weight, int count, int from, int bytes, Byte *out) {
    for (int at = from; at < bytes; at++) {
        int32_t sum = HALF;
        for (int n = 0; n < count; n++) sum += lines[n][at] * weight[n];
        out[at] = limited(sum);
    }
}

#ifdef AVX2
/* R0 R1 G0 G1 ... of two pixels side by side, twice */
#define PAIRED _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
#define WITHOUT_X 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1

AVX2 static inline __m256i joined(__m256i low, __m256i high) { return _mm256_add_epi32(low, _mm256_slli_epi32(high, LOW)); }

AVX2 static void across_two(const Axis *axis, const Byte *row, int first, Byte *out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), half = _mm256_set1_epi32(HALF);
    const __m256i rgb = _mm256_setr_epi8(WITHOUT_X, WITHOUT_X);
    const __m256i *weights = axis->packed;
    for (int at = 0; at < axis->size; at += 8, out += 24) {
        __m256i sums[4];
        for (int n = 0; n < 4; n++, weights += 2) {
            const int *start = axis->start + at + 2 * n;
            const __m128i one = _mm_loadl_epi64((const __m128i *)(row + 4 * (ptrdiff_t)(start[0] - first)));
            const __m128i other = _mm_loadl_epi64((const __m128i *)(row + 4 * (ptrdiff_t)(start[1] - first)));
            const __m256i pixels = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_unpacklo_epi64(one, other), PAIRED));
            const __m256i low = _mm256_madd_epi16(pixels, _mm256_loadu_si256(weights));
            const __m256i high = _mm256_madd_epi16(pixels, _mm256_loadu_si256(weights + 1));
            sums[n] = _mm256_srai_epi32(_mm256_add_epi32(joined(low, high), half), BITS);
        }
        __m256i eight = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        eight = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(eight, order), rgb);
        _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(eight));
        _mm_storeu_si128((__m128i *)(out + 12), _mm256_extracti128_si256(eight, 1));
    }
}

AVX2 static void across_more(const Axis *axis, const Byte *row, int first, Byte *out) {
    const int groups = (axis->most + 3) / 4;
    const __m128i rgb = _mm_setr_epi8(WITHOUT_X), half = _mm_set1_epi32(HALF);
    const __m256i *weights = axis->packed;
    for (int at = 0; at < axis->size; at += 4, out += 12) {
        __m128i sums[4];
        for (int n = 0; n < 4; n++) {
            const Byte *pixel = row + 4 * (ptrdiff_t)(axis->start[at + n] - first);
            const int wanted = at + n < axis->size ? (axis->count[at + n] + 3) / 4 : 0;
            __m256i low = _mm256_setzero_si256(), high = low;
            for (int group = 0; group < wanted; group++) {
                const __m128i four = _mm_loadu_si128((const __m128i *)(pixel + 16 * group));
                const __m256i pixels = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(four, PAIRED));
                low = _mm256_add_epi32(low, _mm256_madd_epi16(pixels, _mm256_loadu_si256(weights + 2 * group)));
                high = _mm256_add_epi32(high, _mm256_madd_epi16(pixels, _mm256_loadu_si256(weights + 2 * group + 1)));
            }
            weights += 2 * groups;
            const __m256i sum = joined(low, high);
            const __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            sums[n] = _mm_srai_epi32(_mm_add_epi32(whole, half), BITS);
        }
        const __m128i four = _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
        _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(four, rgb));
    }
}

/* Two bytes of two rows side by side, in 16 bits, times two weights. */
AVX2 static inline __m256i weighed(__m256i sum, __m256i pairs, __m256i low, __m256i high) {
    return _mm256_add_epi32(sum, joined(_mm256_madd_epi16(pairs, low), _mm256_madd_epi16(pairs, high)));
}

AVX2 static int down_wide(const Byte *const *lines, const int32_t *weight, int count, int bytes, Byte *out) {
    const __m256i zero = _mm256_setzero_si256();
    int at = 0;
    for (; at + 32 <= bytes; at += 32) {
        __m256i sums[4] = {_mm256_set1_epi32(HALF), _mm256_set1_epi32(HALF), _mm256_set1_epi32(HALF),
                           _mm256_set1_epi32(HALF)};
        for (int n = 0; n < count; n += 2) {
            const int second = n + 1 < count;
            const int32_t one = weight[n], other = second ? weight[n + 1] : 0, mask = (1 << LOW) - 1;
            const __m256i low = _mm256_set1_epi32((one & mask) | (other & mask) << 16);
            const __m256i high = _mm256_set1_epi32(one >> LOW | (other >> LOW) << 16);
            const __m256i above = _mm256_loadu_si256((const __m256i *)(lines[n] + at));
            const __m256i below = _mm256_loadu_si256((const __m256i *)(lines[n + second] + at));
            const __m256i left = _mm256_unpacklo_epi8(above, below), right = _mm256_unpackhi_epi8(above, below);
            sums[0] = weighed(sums[0], _mm256_unpacklo_epi8(left, zero), low, high);
            sums[1] = weighed(sums[1], _mm256_unpackhi_epi8(left, zero), low, high);
            sums[2] = weighed(sums[2], _mm256_unpacklo_epi8(right, zero), low, high);
            sums[3] = weighed(sums[3], _mm256_unpackhi_epi8(right, zero), low, high);
        }
        for (int n = 0; n < 4; n++) sums[n] = _mm256_srai_epi32(sums[n], BITS);
        const __m256i left = _mm256_packs_epi32(sums[0], sums[1]), right = _mm256_packs_epi32(sums[2], sums[3]);
        _mm256_storeu_si256((__m256i *)(out + at), _mm256_packus_epi16(left, right));
    }
    return at;
}

VNNI static inline __m512i whole(__m512i low, __m512i middle, __m512i high) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(middle, 8), _mm512_slli_epi32(high, 16));
    return _mm512_srai_epi32(_mm512_add_epi32(low, upper), BITS);
}

VNNI static void across_bytes(const Axis *axis, const Byte *row, int first, Byte *out) {
    const __m512i bands = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m128i rgb = _mm_setr_epi8(WITHOUT_X);
    const __m128i *weights = axis->packed;
    for (int at = 0; at < axis->size; at += 4, out += 12) {
        const Byte *pixels[4];
        for (int n = 0; n < 4; n++) pixels[n] = row + 4 * (ptrdiff_t)(axis->start[at + n] - first);
        __m512i sums[3] = {_mm512_set1_epi32(HALF), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int group = 0; group < axis->groups; group++) {
            __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(pixels[0] + 16 * group)));
            four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(pixels[1] + 16 * group)), 1);
            four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(pixels[2] + 16 * group)), 2);
            four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(pixels[3] + 16 * group)), 3);
            four = _mm512_shuffle_epi8(four, bands);
            for (int part = 0; part < 3; part++) {
                const __m512i of_four = _mm512_castsi128_si512(_mm_loadu_si128(weights++));
                sums[part] = _mm512_dpbusd_epi32(sums[part], four, _mm512_permutexvar_epi32(each, of_four));
            }
        }
        const __m128i four = _mm512_cvtusepi32_epi8(whole(sums[0], sums[1], sums[2]));
        _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(four, rgb));
    }
}

VNNI static void down_bytes(const Axis *axis, int number, int count, int bytes, Byte *out) {
    const int32_t *weights = (const int32_t *)axis->packed + (size_t)(number / 4) * axis->groups * 12 + number % 4;
    const __m512i half = _mm512_set1_epi32(HALF), zero = _mm512_setzero_si512();
    for (int at = 0; at < bytes; at += 64) {
        __m512i low[4] = {half, half, half, half}, middle[4] = {zero, zero, zero, zero};
        __m512i high[4] = {zero, zero, zero, zero};
        for (int n = 0; n < count; n += 4) {
            __m512i line[4], pairs[4], fours[4];
            for (int i = 0; i < 4; i++) {
                line[i] = n + i < count ? _mm512_loadu_si512(axis->lines[n + i] + at) : zero;
            }
            for (int i = 0; i < 2; i++) {
                pairs[2 * i] = _mm512_unpacklo_epi8(line[2 * i], line[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_epi8(line[2 * i], line[2 * i + 1]);
            }
            for (int i = 0; i < 2; i++) {
                fours[2 * i] = _mm512_unpacklo_epi16(pairs[i], pairs[i + 2]);
                fours[2 * i + 1] = _mm512_unpackhi_epi16(pairs[i], pairs[i + 2]);
            }
            for (int i = 0; i < 4; i++) {
                low[i] = _mm512_dpbusd_epi32(low[i], fours[i], _mm512_set1_epi32(weights[3 * n]));
                middle[i] = _mm512_dpbusd_epi32(middle[i], fours[i], _mm512_set1_epi32(weights[3 * n + 4]));
                high[i] = _mm512_dpbusd_epi32(high[i], fours[i], _mm512_set1_epi32(weights[3 * n + 8]));
            }
        }
        for (int i = 0; i < 4; i++) low[i] = whole(low[i], middle[i], high[i]);
        const __m512i left = _mm512_packs_epi32(low[0], low[1]), right = _mm512_packs_epi32(low[2], low[3]);
        const __mmask64 there = bytes - at < 64 ? ((__mmask64)1 << (bytes - at)) - 1 : ~(__mmask64)0;
        _mm512_mask_storeu_epi8(out + at, there, _mm512_packus_epi16(left, right));
    }
}
#endif

void resize_across(const Axis *axis, const Byte *row, int first, Byte *out) {
#ifdef AVX2
    if (HAS_VNNI) {
        across_bytes(axis, row, first, out);
        return;
    }
    if (HAS_AVX2) {
        (axis->most <= 2 ? across_two : across_more)(axis, row, first, out);
        return;
    }
#endif
    across_plainly(axis, row, first, out);
}

void resize_down(const Axis *axis, int number, const Byte *rows, size_t stride, int bytes, Byte *out) {
    const int32_t *weight = axis->weight + (size_t)number * axis->most;
    const int count = axis->count[number];
    const Byte **lines = axis->lines;
    for (int n = 0; n < count; n++) lines[n] = rows + (size_t)((axis->start[number] + n) % axis->most) * stride;
    int done = 0;
#ifdef AVX2
    if (HAS_VNNI) {
        down_bytes(axis, number, count, bytes, out);
        return;
    }
    if (HAS_AVX2) done = down_wide(lines, weight, count, bytes, out);
#endif
    down_plainly(lines, weight, count, done, bytes, out);
}
