/* Decode one region of a JPEG image with libjpeg-turbo's jpeg_skip_scanlines() and jpeg_crop_scanline().
 *
 * size(data) reads the header; decode(data, x, y, width, height, eighths) gives the pixels of a region. No library on
 * PyPI offers this (benchmarks/results tells which were looked at).
 *
 * The bytes come from elsewhere and are not trusted. Every libjpeg error, and every warning about corrupt data, which
 * libjpeg would fill with grey, is a ValueError. Only what can be decoded row by row is taken (see `simple`), so that
 * memory is that of a few rows, and time is bounded by the size that size() has told. The region must lie in the image.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jerror.h>
#include <jpeglib.h>

#ifndef LIBJPEG_TURBO_VERSION
#error "jpeglib.h is not that of libjpeg-turbo"
#endif

/* libjpeg-turbo upsamples colour from the neighbouring columns; at the edge of what it decodes a column lacks one. */
#define MARGIN 2

typedef struct {
    struct jpeg_decompress_struct info; /* first: a pointer to it is a pointer to the whole */
    struct jpeg_error_mgr errors;
    jmp_buf on_error;
    char message[JMSG_LENGTH_MAX];
    unsigned char *row;
} Reader;

typedef struct {
    JDIMENSION x, y, width, height; /* in pixels of the scaled image */
} Region;

static void fail(j_common_ptr info) {
    Reader *reader = (Reader *)info;
    info->err->format_message(info, reader->message);
    longjmp(reader->on_error, 1);
}

static void fail_with(Reader *reader, const char *message) {
    snprintf(reader->message, sizeof reader->message, "%s", message);
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

/* Called inside the setjmp() of a function that destroys the reader. */
static void read_header(Reader *reader, const Py_buffer *data) {
    jpeg_create_decompress(&reader->info);
    jpeg_mem_src(&reader->info, data->buf, (unsigned long)data->len);
    jpeg_read_header(&reader->info, TRUE);
}

static void init(Reader *reader) {
    memset(reader, 0, sizeof *reader);
    reader->info.err = jpeg_std_error(&reader->errors);
    reader->errors.error_exit = fail;
    reader->errors.emit_message = warn;
}

static int read_size(Reader *reader, const Py_buffer *data, unsigned *width, unsigned *height, int *is_simple) {
    init(reader);
    if (setjmp(reader->on_error)) {
        jpeg_destroy_decompress(&reader->info);
        return -1;
    }
    read_header(reader, data);
    *width = reader->info.image_width;
    *height = reader->info.image_height;
    *is_simple = simple(&reader->info);
    jpeg_destroy_decompress(&reader->info);
    return 0;
}

static int decode_region(Reader *reader, const Py_buffer *data, Region region, unsigned eighths, unsigned char *out) {
    init(reader);
    if (setjmp(reader->on_error)) {
        jpeg_destroy_decompress(&reader->info);
        free(reader->row);
        return -1;
    }
    read_header(reader, data);
    if (!simple(&reader->info)) fail_with(reader, "this kind of JPEG is not decoded by regions");
    reader->info.out_color_space = JCS_RGB;
    reader->info.scale_num = eighths;
    reader->info.scale_denom = 8;
    jpeg_start_decompress(&reader->info);
    JDIMENSION full = reader->info.output_width;
    if (region.width > full || region.x > full - region.width || region.height > reader->info.output_height ||
        region.y > reader->info.output_height - region.height) {
        fail_with(reader, "the region is not inside the image");
    }
    JDIMENSION left = region.x > MARGIN ? region.x - MARGIN : 0;
    JDIMENSION right = full - (region.x + region.width) > MARGIN ? region.x + region.width + MARGIN : full;
    JDIMENSION columns = right - left;
    jpeg_crop_scanline(&reader->info, &left, &columns); /* moves left back to where a block begins */
    reader->row = malloc((size_t)reader->info.output_width * 3);
    if (reader->row == NULL) fail_with(reader, "there is no memory");
    if (region.y > 0) jpeg_skip_scanlines(&reader->info, region.y);
    const size_t bytes = (size_t)region.width * 3;
    for (JDIMENSION line = 0; line < region.height; line++) {
        JSAMPROW row = reader->row;
        jpeg_read_scanlines(&reader->info, &row, 1);
        memcpy(out + line * bytes, reader->row + (size_t)(region.x - left) * 3, bytes);
    }
    jpeg_destroy_decompress(&reader->info); /* and not jpeg_finish_decompress(), which would read what is below */
    free(reader->row);
    return 0;
}

PyDoc_STRVAR(size_doc,
             "size(data) -> (width, height, simple)\n\n"
             "Width and height in pixels from the header, and whether decode() takes this kind of JPEG.\n"
             "Raises ValueError where the header cannot be read.");

static PyObject *size(PyObject *Py_UNUSED(self), PyObject *argument) {
    Py_buffer data;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE) < 0) return NULL;
    Reader reader;
    unsigned width = 0, height = 0;
    int is_simple = 0;
    int failed = read_size(&reader, &data, &width, &height, &is_simple);
    PyBuffer_Release(&data);
    if (failed) return PyErr_Format(PyExc_ValueError, "%s", reader.message);
    return Py_BuildValue("IIN", width, height, PyBool_FromLong(is_simple));
}

PyDoc_STRVAR(decode_doc,
             "decode(data, x, y, width, height, eighths=8) -> bytes\n\n"
             "RGB pixels of a region, height * width * 3 bytes, with the GIL released. eighths (1, 2, 4 or 8) scales\n"
             "the image in the DCT to ceil(side * eighths / 8) pixels; the region is one of the scaled image.\n"
             "Raises ValueError where the data is corrupt or not simple, or the region is empty or not in the image.");

static PyObject *decode(PyObject *Py_UNUSED(self), PyObject *args) {
    Py_buffer data;
    long long x, y, width, height;
    int eighths = 8;
    if (!PyArg_ParseTuple(args, "y*LLLL|i", &data, &x, &y, &width, &height, &eighths)) return NULL;
    PyObject *pixels = NULL;
    Reader reader;
    int failed = 1;
    const long long most = JPEG_MAX_DIMENSION;
    if (x < 0 || y < 0 || width < 1 || height < 1 || x > most || y > most || width > most || height > most) {
        PyErr_SetString(PyExc_ValueError, "the region is empty or not inside the image");
        goto done;
    }
    if (eighths != 1 && eighths != 2 && eighths != 4 && eighths != 8) {
        PyErr_SetString(PyExc_ValueError, "eighths must be 1, 2, 4 or 8");
        goto done;
    }
    pixels = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(width * height * 3));
    if (pixels == NULL) goto done;
    Region region = {(JDIMENSION)x, (JDIMENSION)y, (JDIMENSION)width, (JDIMENSION)height};
    unsigned char *out = (unsigned char *)PyBytes_AS_STRING(pixels);
    Py_BEGIN_ALLOW_THREADS;
    failed = decode_region(&reader, &data, region, (unsigned)eighths, out);
    Py_END_ALLOW_THREADS;
    if (failed) {
        PyErr_SetString(PyExc_ValueError, reader.message);
        Py_CLEAR(pixels);
    }
done:
    PyBuffer_Release(&data);
    return pixels;
}

static PyMethodDef methods[] = {
    {"size", size, METH_O, size_doc},
    {"decode", decode, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_jpeg", "Decode one region of a JPEG image.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModuleDef_Init(&module); }
