/* JPEGs by regions: what _jpeg.c offers to _batch.c. */
#ifndef QSR_JPEG_H
#define QSR_JPEG_H

#include <setjmp.h>
#include <stdio.h>
#include <sys/types.h>

#include <jerror.h>
#include <jpeglib.h>

#include "_resize.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "jpeglib.h is not that of libjpeg-turbo"
#endif

typedef struct {
    struct jpeg_decompress_struct info; /* first: a pointer to it is a pointer to the whole */
    struct jpeg_error_mgr errors;
    jmp_buf on_error;
    char *message; /* JMSG_LENGTH_MAX bytes */
} Reader;

typedef struct {
    JDIMENSION x, y, width, height; /* in pixels of the scaled image */
} Region;

/* What one thread needs, kept from batch to batch. */
typedef struct Work {
    struct Work *next;
    Reader reader;
    Axis across, down;
    Room file, row, shown, rows, spare;
} Work;

typedef struct {
    const void *data; /* NULL: `length` bytes from `offset` on of `file` */
    size_t length;
    int file;
    off_t offset;
    Region region; /* what may be seen, and in it */
    float box[4];  /* what is shown: left, top, right, bottom */
    unsigned eighths;
    int flip;
    const double *operations;
    Byte *out;
    char message[JMSG_LENGTH_MAX]; /* empty where all is well */
} Picture;

/* Width, height, and whether it is taken; 0, or -1 with a message. */
int read_size(char *message, const void *data, size_t length, unsigned *found);

/* RGB pixels of a region; 0, or -1 with a message. */
int decode_region(char *message, const void *data, size_t length, Region region, unsigned eighths, Byte *out);

/* A picture of size * size pixels, with up to so many operations, or its message. */
void make_picture(Work *work, Picture *picture, int size, int operations);

#endif
