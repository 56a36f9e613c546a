/* Decode the rows and columns of a crop with libjpeg-turbo's jpeg_skip_scanlines() and jpeg_crop_scanline(), and resize
 * each row while it is in the cache. No library on PyPI offers this (docs/decoding.md tells which were looked at).
 *
 * The bytes come from elsewhere and are not trusted. Every libjpeg error, and every warning about corrupt data, which
 * libjpeg would fill with grey, ends the picture with a message. Only what can be decoded row by row is taken (see
 * `simple`), so that memory is that of a few rows, and time is bounded by the size that read_size() has told. The
 * region must lie in the image. A picture has a reader of its own: tables of the one before it are never used.
 */
#include "_jpeg.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* libjpeg-turbo upsamples colour from the neighbouring columns; at the edge of what it decodes a column lacks one. */
#define MARGIN 2

static void fail(j_common_ptr info) {
    Reader *reader = (Reader *)info;
    info->err->format_message(info, reader->message);
    longjmp(reader->on_error, 1);
}

static void fail_with(Reader *reader, const char *message) {
    snprintf(reader->message, JMSG_LENGTH_MAX, "%s", message);
    longjmp(reader->on_error, 1);
}

static void warn(j_common_ptr info, int level) {
    if (level < 0) fail(info);
}

/* Colour and sampling that the tests compare bit for bit with a whole decode, in one scan. */
static int simple(j_decompress_ptr info) {
    if (info->progressive_mode || info->arith_code || info->data_precision != 8) return 0;
    if (jpeg_has_multiple_scans(info)) return 0;
    jpeg_component_info *luma = info->comp_info;
    if (info->jpeg_color_space == JCS_GRAYSCALE) {
        return info->num_components == 1 && luma->h_samp_factor == 1 && luma->v_samp_factor == 1;
    }
    if (info->jpeg_color_space != JCS_YCbCr || info->num_components != 3) return 0;
    for (int n = 1; n < 3; n++) {
        if (luma[n].h_samp_factor != 1 || luma[n].v_samp_factor != 1) return 0;
    }
    int h = luma->h_samp_factor, v = luma->v_samp_factor;
    return (h == 1 && v == 1) || (h == 2 && v == 1) || (h == 2 && v == 2); /* 4:4:4, 4:2:2, 4:2:0 */
}

static void init(Reader *reader, char *message) {
    memset(reader, 0, sizeof *reader);
    reader->info.err = jpeg_std_error(&reader->errors);
    reader->errors.error_exit = fail;
    reader->errors.emit_message = warn;
    reader->message = message;
}

/* Called inside the setjmp() of a function that destroys the reader. */
static void read_header(Reader *reader, const void *data, size_t length) {
    jpeg_create_decompress(&reader->info);
    jpeg_mem_src(&reader->info, data, (unsigned long)length);
    jpeg_read_header(&reader->info, TRUE);
}

int read_size(char *message, const void *data, size_t length, unsigned *found) {
    Reader reader;
    init(&reader, message);
    const int failed = setjmp(reader.on_error);
    if (!failed) {
        read_header(&reader, data, length);
        found[0] = reader.info.image_width;
        found[1] = reader.info.image_height;
        found[2] = (unsigned)simple(&reader.info);
    }
    jpeg_destroy_decompress(&reader.info);
    return failed ? -1 : 0;
}

/* As read_header(): begins a decode, so that the next row is the first one of the region. Returns the first column of
 * the rows, which is one of the region's or to the left of it. */
static JDIMENSION begin(Reader *reader, const void *data, size_t length, Region region, unsigned eighths,
                        J_COLOR_SPACE colour) {
    j_decompress_ptr info = &reader->info;
    read_header(reader, data, length);
    if (!simple(info)) fail_with(reader, "this kind of JPEG is not decoded by regions");
    info->out_color_space = colour;
    info->scale_num = eighths;
    info->scale_denom = 8;
    jpeg_start_decompress(info);
    const JDIMENSION full = info->output_width;
    if (region.width > full || region.x > full - region.width || region.height > info->output_height ||
        region.y > info->output_height - region.height) {
        fail_with(reader, "the region is not inside the image");
    }
    JDIMENSION left = region.x > MARGIN ? region.x - MARGIN : 0;
    const JDIMENSION right = full - (region.x + region.width) > MARGIN ? region.x + region.width + MARGIN : full;
    JDIMENSION columns = right - left;
    jpeg_crop_scanline(info, &left, &columns); /* moves left back to where a block begins */
    if (region.y > 0 && jpeg_skip_scanlines(info, region.y) != region.y) fail_with(reader, "rows are missing");
    return left;
}

static void next_row(Reader *reader, Byte *row) {
    JSAMPROW rows = row;
    if (jpeg_read_scanlines(&reader->info, &rows, 1) != 1) fail_with(reader, "a row is missing");
}

static void *wanted(Reader *reader, Room *room, size_t bytes) {
    void *found = room_for(room, bytes);
    if (found == NULL) fail_with(reader, "there is no memory");
    return found;
}

/* Reads on where a read gives less than was asked for, as those of a network's files may. An index that is not that of
 * its file shows in that no JPEG begins or ends at the place. */
static const void *read_file(Work *work, const Picture *picture) {
    if (picture->data != NULL) return picture->data;
    char *at = wanted(&work->reader, &work->file, picture->length + 1);
    for (size_t done = 0; done < picture->length;) {
        const ssize_t got = pread(picture->file, at + done, picture->length - done, picture->offset + (off_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail_with(&work->reader, strerror(errno));
        if (got == 0) fail_with(&work->reader, "the file ends in the middle of the image");
        done += (size_t)got;
    }
    const Byte *bytes = (const Byte *)at;
    const size_t length = picture->length;
    if (length < 4 || bytes[length - 2] != 0xFF || bytes[length - 1] != 0xD9) fail_with(&work->reader, "no whole JPEG lies there");
    return at;
}

/* Where an image loses more than twice as many rows as columns, Pillow (13 and newer) resizes down before across. */
static int down_is_first(Region region, int size) {
    const int rows = (int)region.height - size, columns = (int)region.width - size;
    return rows > 0 && rows > 2 * columns;
}

/* Decodes and resizes: every row goes through `rows`, which holds as many as a row of the result needs. */
static void show(Work *work, const Picture *picture, int size) {
    Reader *reader = &work->reader;
    Axis *across = &work->across, *down = &work->down;
    const Region region = picture->region;
    const float *box = picture->box;
    if (axis_set(across, (int)region.width, box[0], box[2], size, picture->flip) < 0 ||
        axis_set(down, (int)region.height, box[1], box[3], size, 0) < 0) {
        fail_with(reader, "there is no memory");
    }
    const int first = axis_first(across), top = axis_first(down), end = axis_end(down);
    const Region seen = {region.x + (JDIMENSION)first, region.y + (JDIMENSION)top,
                         (JDIMENSION)(axis_end(across) - first), (JDIMENSION)(end - top)};
    const void *data = read_file(work, picture);
    const JDIMENSION left = begin(reader, data, picture->length, seen, picture->eighths, JCS_EXT_RGBX);
    const int column = (int)left - (int)region.x; /* that of a row's first pixel, in the region */
    const int down_first = down_is_first(region, size), bytes = size * 3;
    const int decoded = (int)reader->info.output_width * 4;
    const size_t stride = (size_t)(down_first ? decoded : bytes) + PADDING;
    Byte *row = wanted(reader, &work->row, (size_t)decoded + 4 * (size_t)across->most + PADDING);
    Byte *shown = wanted(reader, &work->shown, (size_t)bytes + PADDING);
    Byte *rows = wanted(reader, &work->rows, stride * (size_t)down->most);
    Byte *out = picture->out;
    for (int line = top, done = 0; line < end; line++) {
        Byte *slot = rows + (size_t)(line % down->most) * stride;
        next_row(reader, down_first ? slot : row);
        if (!down_first) resize_across(across, row, column, slot);
        for (; done < size && down->start[done] + down->count[done] - 1 <= line; done++, out += bytes) {
            if (down_first) {
                resize_down(down, done, rows, stride, decoded, row);
                resize_across(across, row, column, shown);
                memcpy(out, shown, (size_t)bytes);
            } else {
                resize_down(down, done, rows, stride, bytes, out);
            }
        }
    }
}

void make_picture(Work *work, Picture *picture, int size, int operations) {
    Reader *reader = &work->reader;
    init(reader, picture->message);
    if (setjmp(reader->on_error) == 0) {
        show(work, picture, size);
        for (int n = 0; n < operations; n++) {
            const double *operation = picture->operations + n * OPERATION_VALUES;
            if (operation[0] < 0) break;
            Byte *spare = wanted(reader, &work->spare, (size_t)size * size * 3 + PADDING);
            if (operate(operation, picture->out, spare, size) < 0) fail_with(reader, "there is no such operation");
        }
    }
    jpeg_destroy_decompress(&reader->info); /* and not jpeg_finish_decompress(), which would read what is below */
}

int decode_region(char *message, const void *data, size_t length, Region region, unsigned eighths, Byte *out) {
    Work work;
    memset(&work, 0, sizeof work);
    Reader *reader = &work.reader;
    init(reader, message);
    const int failed = setjmp(reader->on_error);
    if (!failed) {
        const JDIMENSION left = begin(reader, data, length, region, eighths, JCS_RGB);
        Byte *row = wanted(reader, &work.row, (size_t)reader->info.output_width * 3);
        const size_t bytes = (size_t)region.width * 3;
        for (JDIMENSION line = 0; line < region.height; line++) {
            next_row(reader, row);
            memcpy(out + line * bytes, row + (size_t)(region.x - left) * 3, bytes);
        }
    }
    jpeg_destroy_decompress(&reader->info);
    free(work.row.at);
    return failed ? -1 : 0;
}
