/* Pillow's antialiased bilinear resize of RGB, row by row, and what is done to the picture afterwards (_pixels.c). */
#ifndef QSR_RESIZE_H
#define QSR_RESIZE_H

#include <stddef.h>
#include <stdint.h>

typedef unsigned char Byte;

#define PADDING 64 /* bytes that may be read, and written, behind a row and behind a picture of `spare` */

typedef struct {
    void *at;
    size_t bytes;
} Room; /* memory that is kept from picture to picture */

/* At least so many bytes, or NULL. What was in it is lost where it has to grow. */
void *room_for(Room *room, size_t bytes);

/* Instructions that may be used, where the processor has them: 0 plain ones, 1 AVX2, 2 AVX-512 with VNNI. For tests; no
 * call may run while it is changed. */
extern int vectors;

/* One axis of a resize: pixel n of the result is a weighted sum of `count[n]` pixels from `start[n]` on. */
typedef struct {
    int size, most; /* pixels of the result; largest count */
    int *start, *count;
    int32_t *weight; /* `most` of them a pixel, in 2^22ths */
    void *packed;    /* the same, split and laid out as the vector instructions want them */
    int groups;      /* of four pixels that one of the result sees, as VNNI takes them */
    const Byte **lines; /* scratch of resize_down(), `most` of them */
    Room starts, counts, weights, packs, doubles, pointers;
} Axis;

/* From `side` pixels, of which `from` to `to` are shown, to `size` pixels; 0, or -1 where there is no memory. */
int axis_set(Axis *axis, int side, float from, float to, int size, int flip);
void axis_free(Axis *axis);

/* First pixel that is read, and the one behind the last. */
int axis_first(const Axis *axis);
int axis_end(const Axis *axis);

/* RGBX pixels, the first of them number `first` of the axis, to axis->size RGB pixels. Both rows have PADDING, and that of
 * RGBX has axis->most pixels besides: who sees fewer than others is given as many, of weight 0. */
void resize_across(const Axis *axis, const Byte *row, int first, Byte *out);

/* Row `number` of the result from rows that resize_across() made; row n lies at
 * rows + n % axis->most * stride. */
void resize_down(const Axis *axis, int number, const Byte *rows, size_t stride, int bytes, Byte *out);

#define OPERATION_VALUES 7 /* which, and what it takes */

/* Change a picture of side * side RGB pixels in place; `spare` is as large. 0, or -1 where there is no such operation.
 */
int operate(const double *operation, Byte *pixels, Byte *spare, int side);

#endif
