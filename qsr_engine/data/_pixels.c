/* What RandAugment does to a square RGB picture, in place, with the pixels of Pillow's functions (randaugment.py names
 * them). Pillow calls a function through a pointer for each pixel, filters with a kernel of floats, and makes a new
 * image every time. Rounding is Pillow's: positions and mixtures are doubles or floats, and are cut off.
 */
#include <math.h>
#include <string.h>

#include "_resize.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

typedef Byte Table[3][256];

static int within(int value, int side) { return value < 0 ? 0 : value >= side ? side - 1 : value; }

static double between(double from, double to, double share) { return from + (to - from) * share; }

static void affine_pixel(const Byte *in, Byte *out, int side, int row, int column, const double *m) {
    const double x_in = column + 0.5, y_in = row + 0.5;
    double x = m[0] * x_in + m[1] * y_in + m[2];
    double y = m[3] * x_in + m[4] * y_in + m[5];
    if (!(x >= 0.0 && x < side && y >= 0.0 && y < side)) {
        out[0] = out[1] = out[2] = 0;
        return;
    }
    x -= 0.5;
    y -= 0.5;
    const int left = (int)(x + 1.0) - 1, top = (int)(y + 1.0) - 1; /* floor of what is above -1 */
    const double dx = x - left, dy = y - top;
    const int x0 = 3 * within(left, side), x1 = 3 * within(left + 1, side);
    const Byte *first = in + 3 * (ptrdiff_t)side * within(top, side);
    const Byte *second = in + 3 * (ptrdiff_t)side * within(top + 1, side);
    for (int band = 0; band < 3; band++) {
        const double upper = between(first[x0 + band], first[x1 + band], dx);
        const double lower = between(second[x0 + band], second[x1 + band], dx);
        out[band] = (Byte)between(upper, lower, dy);
    }
}

#ifdef AVX2
typedef struct {
    __m128i first0, first1, second0, second1; /* four pixels each, a byte a band */
    __m256d dx, dy;
} Neighbours;

AVX2 static inline __m256d band_of(__m128i pixels, int band) {
    return _mm256_cvtepi32_pd(_mm_and_si128(_mm_srli_epi32(pixels, 8 * band), _mm_set1_epi32(255)));
}

AVX2 static inline __m256d mixture(__m256d from, __m256d to, __m256d share) {
    return _mm256_add_pd(from, _mm256_mul_pd(_mm256_sub_pd(to, from), share));
}

AVX2 static inline __m128i band_between(const Neighbours *n, int band) {
    const __m256d upper = mixture(band_of(n->first0, band), band_of(n->first1, band), n->dx);
    const __m256d lower = mixture(band_of(n->second0, band), band_of(n->second1, band), n->dx);
    return _mm_slli_epi32(_mm256_cvttpd_epi32(mixture(upper, lower, n->dy)), 8 * band);
}

/* Four pixels of a row at a time; the rest, less than four, is left. Returns how many are done. */
AVX2 static int affine_wide(const Byte *in, Byte *out, int side, int row, const double *m) {
    const __m256d half = _mm256_set1_pd(0.5), one = _mm256_set1_pd(1.0), none = _mm256_setzero_pd();
    const __m256d limit = _mm256_set1_pd(side), y_in = _mm256_set1_pd(row + 0.5);
    const __m256d down_x = _mm256_mul_pd(_mm256_set1_pd(m[1]), y_in), down_y = _mm256_mul_pd(_mm256_set1_pd(m[4]), y_in);
    const __m128i last = _mm_set1_epi32(side - 1), zero = _mm_setzero_si128(), next = _mm_set1_epi32(1);
    const __m128i line = _mm_set1_epi32(3 * side), three = _mm_set1_epi32(3);
    const __m128i rgb = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int column = 0;
    for (; column + 4 <= side; column += 4, out += 12) {
        const __m256d x_in = _mm256_add_pd(_mm256_set1_pd(column), _mm256_setr_pd(0.5, 1.5, 2.5, 3.5));
        __m256d x = _mm256_add_pd(_mm256_mul_pd(_mm256_set1_pd(m[0]), x_in), down_x);
        __m256d y = _mm256_add_pd(_mm256_mul_pd(_mm256_set1_pd(m[3]), x_in), down_y);
        x = _mm256_add_pd(x, _mm256_set1_pd(m[2]));
        y = _mm256_add_pd(y, _mm256_set1_pd(m[5]));
        const __m256d x_inside = _mm256_and_pd(_mm256_cmp_pd(x, none, _CMP_GE_OQ), _mm256_cmp_pd(x, limit, _CMP_LT_OQ));
        const __m256d y_inside = _mm256_and_pd(_mm256_cmp_pd(y, none, _CMP_GE_OQ), _mm256_cmp_pd(y, limit, _CMP_LT_OQ));
        const __m256d inside = _mm256_and_pd(x_inside, y_inside);
        if (_mm256_testz_pd(inside, inside)) {
            memset(out, 0, 12);
            continue;
        }
        x = _mm256_sub_pd(_mm256_and_pd(x, inside), half); /* what is outside is read at the corner, and not shown */
        y = _mm256_sub_pd(_mm256_and_pd(y, inside), half);
        const __m128i left = _mm_sub_epi32(_mm256_cvttpd_epi32(_mm256_add_pd(x, one)), next);
        const __m128i top = _mm_sub_epi32(_mm256_cvttpd_epi32(_mm256_add_pd(y, one)), next);
        const __m128i x0 = _mm_mullo_epi32(_mm_max_epi32(left, zero), three);
        const __m128i x1 = _mm_mullo_epi32(_mm_min_epi32(_mm_add_epi32(left, next), last), three);
        const __m128i y0 = _mm_mullo_epi32(_mm_max_epi32(top, zero), line);
        const __m128i y1 = _mm_mullo_epi32(_mm_min_epi32(_mm_add_epi32(top, next), last), line);
        const Neighbours found = {
            _mm_i32gather_epi32((const int *)in, _mm_add_epi32(x0, y0), 1),
            _mm_i32gather_epi32((const int *)in, _mm_add_epi32(x1, y0), 1),
            _mm_i32gather_epi32((const int *)in, _mm_add_epi32(x0, y1), 1),
            _mm_i32gather_epi32((const int *)in, _mm_add_epi32(x1, y1), 1),
            _mm256_sub_pd(x, _mm256_cvtepi32_pd(left)),
            _mm256_sub_pd(y, _mm256_cvtepi32_pd(top)),
        };
        const __m128i low = _mm_or_si128(band_between(&found, 0), band_between(&found, 1));
        const __m256i mask = _mm256_castpd_si256(inside);
        const __m128i shown = _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(_mm256_castsi256_si128(mask)),
                                                              _mm_castsi128_ps(_mm256_extracti128_si256(mask, 1)), 0x88));
        Byte four[16];
        const __m128i whole = _mm_and_si128(_mm_or_si128(low, band_between(&found, 2)), shown);
        _mm_storeu_si128((__m128i *)four, _mm_shuffle_epi8(whole, rgb));
        memcpy(out, four, 12);
    }
    return column;
}
#endif

/* `in` has PADDING. What comes from outside is black. */
static void affine(const Byte *in, Byte *out, int side, const double *matrix) {
    for (int row = 0; row < side; row++) {
        int column = 0;
#ifdef AVX2
        if (__builtin_cpu_supports("avx2")) column = affine_wide(in, out, side, row, matrix);
#endif
        for (out += 3 * column; column < side; column++, out += 3) affine_pixel(in, out, side, row, column, matrix);
    }
}

/* What was at (x + dx, y + dy) is at (x, y). */
static void move(const Byte *in, Byte *out, int side, int dx, int dy) {
    const int left = dx < 0 ? -dx : 0, count = side - (dx < 0 ? -dx : dx);
    for (int row = 0; row < side; row++, out += 3 * side) {
        memset(out, 0, (size_t)side * 3);
        if (count <= 0 || row + dy < 0 || row + dy >= side) continue;
        memcpy(out + 3 * left, in + 3 * ((ptrdiff_t)side * (row + dy) + left + dx), (size_t)count * 3);
    }
}

/* From one value towards another and beyond, as Pillow's blend: cut off, and limited to a byte. */
static Byte mixed(int from, int to, float factor) {
    const float found = from + factor * (to - from);
    return (Byte)(int)(found <= 0.0f ? 0.0f : found >= 255.0f ? 255.0f : found);
}

/* The kernel of Pillow's SMOOTH has 5 in the middle and 1 around it, of 13; the border stays as it is. */
static void sharpen_row(const Byte *in, Byte *restrict out, int side, int row, float factor) {
    const int length = 3 * side;
    const Byte *here = in + (ptrdiff_t)length * row;
    memcpy(out, here, (size_t)length);
    if (row == 0 || row == side - 1) return;
    const Byte *above = here - length, *below = here + length;
    for (int i = 3; i < length - 3; i++) {
        const uint16_t sum = (uint16_t)(above[i - 3] + above[i] + above[i + 3] + here[i - 3] + 5 * here[i] +
                                        here[i + 3] + below[i - 3] + below[i] + below[i + 3] + 6);
        out[i] = (Byte)((sum * 5042u) >> 16); /* a 13th, rounded: exact up to 3,321, the largest */
    }
    for (int i = 3; i < length - 3; i++) out[i] = mixed(out[i], here[i], factor);
}

static int grey_of(const Byte *pixel) {
    return (int)((pixel[0] * 19595u + pixel[1] * 38470u + pixel[2] * 7471u + 0x8000u) >> 16);
}

/* In two loops, of which the compiler makes vector instructions. */
static void color(Byte *restrict pixels, Byte *restrict spare, size_t count, float factor) {
    for (size_t n = 0; n < count; n++) memset(spare + 3 * n, grey_of(pixels + 3 * n), 3);
    for (size_t n = 0; n < 3 * count; n++) pixels[n] = mixed(spare[n], pixels[n], factor);
}

static int mean_grey(const Byte *pixels, size_t count) {
    uint64_t sum = 0;
    for (size_t n = 0; n < count; n++) sum += (uint64_t)grey_of(pixels + 3 * n);
    return (int)((double)sum / (double)count + 0.5);
}

static void from_grey(Table table, int grey, float factor) {
    for (int value = 0; value < 256; value++) {
        table[0][value] = table[1][value] = table[2][value] = mixed(grey, value, factor);
    }
}

static void autocontrast(Byte *table, const uint32_t *counts) {
    int low = 0, high = 255;
    while (low < 255 && !counts[low]) low++;
    while (high > 0 && !counts[high]) high--;
    const double scale = high > low ? 255.0 / (high - low) : 1.0, offset = high > low ? -low * scale : 0.0;
    for (int value = 0; value < 256; value++) {
        const int found = (int)(value * scale + offset);
        table[value] = (Byte)(found < 0 ? 0 : found > 255 ? 255 : found);
    }
}

static void equalize(Byte *table, const uint32_t *counts, size_t count) {
    int last = 255;
    while (last > 0 && !counts[last]) last--;
    const size_t step = (count - counts[last]) / 255;
    size_t sum = step / 2;
    for (int value = 0; value < 256; sum += counts[value++]) {
        const size_t found = step ? sum / step : (size_t)value;
        table[value] = (Byte)(found > 255 ? 255 : found);
    }
}

static void by_histogram(Table table, int equal, const Byte *pixels, size_t count) {
    uint32_t counts[3][256] = {{0}};
    for (size_t n = 0; n < count; n++, pixels += 3) {
        for (int band = 0; band < 3; band++) counts[band][pixels[band]]++;
    }
    for (int band = 0; band < 3; band++) {
        if (equal) equalize(table[band], counts[band], count);
        else autocontrast(table[band], counts[band]);
    }
}

/* Posterize keeps so many bits; solarize inverts from a value on. */
static void by_value(Table table, int posterize, int limit) {
    for (int value = 0; value < 256; value++) {
        const int found = posterize ? value >> (8 - limit) << (8 - limit) : value < limit ? value : 255 - value;
        table[0][value] = table[1][value] = table[2][value] = (Byte)found;
    }
}

enum { AFFINE, MOVE, SHARPEN, COLOR, CONTRAST, BRIGHTNESS, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE };

int operate(const double *operation, Byte *pixels, Byte *spare, int side) {
    const size_t count = (size_t)side * side;
    if (!(operation[0] >= 0 && operation[0] <= SOLARIZE)) return -1;
    const int kind = (int)operation[0];
    const float factor = (float)operation[1];
    Table table;
    if (kind >= SHARPEN && kind <= BRIGHTNESS && !isfinite(factor)) return -1;
    if (kind == MOVE && !(fabs(operation[1]) <= side && fabs(operation[2]) <= side)) return -1;
    if (kind == POSTERIZE && !(operation[1] >= 0 && operation[1] <= 8)) return -1;
    if (kind == SOLARIZE && !(operation[1] >= 0 && operation[1] <= 256)) return -1;
    if (kind <= SHARPEN) {
        memcpy(spare, pixels, count * 3);
        if (kind == AFFINE) affine(spare, pixels, side, operation + 1);
        else if (kind == MOVE) move(spare, pixels, side, (int)operation[1], (int)operation[2]);
        else for (int row = 0; row < side; row++) sharpen_row(spare, pixels + (size_t)3 * side * row, side, row, factor);
        return 0;
    }
    if (kind == COLOR) {
        color(pixels, spare, count, factor);
        return 0;
    }
    if (kind == CONTRAST) from_grey(table, mean_grey(pixels, count), factor);
    else if (kind == BRIGHTNESS) from_grey(table, 0, factor);
    else if (kind <= EQUALIZE) by_histogram(table, kind == EQUALIZE, pixels, count);
    else by_value(table, kind == POSTERIZE, (int)operation[1]);
    for (size_t n = 0; n < count; n++, pixels += 3) {
        for (int band = 0; band < 3; band++) pixels[band] = table[band][pixels[band]];
    }
    return 0;
}
