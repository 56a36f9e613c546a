/* The module _jpeg: a batch of JPEGs as pictures in one call. Threads take pictures from a counter; each decodes and
 * resizes (_jpeg.c, _resize.c), and changes the picture (_pixels.c).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "_jpeg.h"

#define LARGEST 8192 /* pixels of a picture's side */
#define THREADS 256

typedef struct {
    Picture *pictures;
    Py_ssize_t count;
    int size, operations;
    atomic_long next;
} Batch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Work *idle = NULL;

static Work *take_work(void) {
    pthread_mutex_lock(&lock);
    Work *work = idle;
    if (work != NULL) idle = work->next;
    pthread_mutex_unlock(&lock);
    return work != NULL ? work : calloc(1, sizeof *work);
}

static void give_work(Work *work) {
    pthread_mutex_lock(&lock);
    work->next = idle;
    idle = work;
    pthread_mutex_unlock(&lock);
}

static void *run(void *argument) {
    Batch *batch = argument;
    Work *work = take_work();
    long number;
    while ((number = atomic_fetch_add(&batch->next, 1)) < batch->count) {
        Picture *picture = batch->pictures + number;
        if (work != NULL) make_picture(work, picture, batch->size, batch->operations);
        else snprintf(picture->message, sizeof picture->message, "there is no memory");
    }
    if (work != NULL) give_work(work);
    return NULL;
}

/* This thread does its part, and all of it where no other thread can be had. */
static void run_all(Batch *batch, int threads) {
    pthread_t others[THREADS];
    int started = 0;
    while (started < threads - 1 && started + 1 < batch->count) {
        if (pthread_create(&others[started], NULL, run, batch) != 0) break;
        started++;
    }
    run(batch);
    while (started > 0) pthread_join(others[--started], NULL);
}

#define PLAN_VALUES 11 /* see decode_batch_doc */

/* One picture of the batch from what Python gives. -1 with an exception where that is nonsense. */
static int plan_picture(Picture *picture, Py_buffer *data, PyObject *source, const double *plan, const Py_buffer *out,
                        int size) {
    for (int n = 0; n < PLAN_VALUES; n++) {
        if (!(plan[n] >= 0 && plan[n] <= JPEG_MAX_DIMENSION)) goto wrong;
    }
    picture->region = (Region){(JDIMENSION)plan[1], (JDIMENSION)plan[2], (JDIMENSION)plan[3], (JDIMENSION)plan[4]};
    picture->eighths = (unsigned)plan[5];
    if (picture->eighths != 1 && picture->eighths != 2 && picture->eighths != 4 && picture->eighths != 8) goto wrong;
    for (int n = 0; n < 4; n++) picture->box[n] = (float)plan[6 + n];
    const float *box = picture->box;
    if (plan[0] >= (double)(out->len / size / size / 3) || !(box[0] < box[2] && box[2] <= picture->region.width) ||
        !(box[1] < box[3] && box[3] <= picture->region.height)) {
        goto wrong;
    }
    picture->flip = plan[10] != 0;
    picture->out = (Byte *)out->buf + (size_t)plan[0] * size * size * 3;
    if (PyTuple_Check(source)) {
        long long offset;
        Py_ssize_t length;
        if (!PyArg_ParseTuple(source, "iLn", &picture->file, &offset, &length)) return -1;
        if (offset < 0 || length < 0) goto wrong;
        picture->offset = (off_t)offset;
        picture->length = (size_t)length;
        return 0;
    }
    if (PyObject_GetBuffer(source, data, PyBUF_SIMPLE) < 0) return -1;
    picture->data = data->buf;
    picture->length = (size_t)data->len;
    return 0;
wrong:
    PyErr_SetString(PyExc_ValueError, "a place, a region, a box or an extent is empty, negative or outside");
    return -1;
}

static PyObject *messages(const Picture *pictures, Py_ssize_t count) {
    PyObject *found = PyList_New(count);
    for (Py_ssize_t n = 0; found != NULL && n < count; n++) {
        const char *text = pictures[n].message;
        PyObject *message = text[0] ? PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace") : Py_NewRef(Py_None);
        if (message == NULL) Py_CLEAR(found);
        else PyList_SET_ITEM(found, n, message);
    }
    return found;
}

PyDoc_STRVAR(decode_batch_doc,
             "decode_batch(sources, plans, operations, out, size, threads=1) -> list[str | None]\n\n"
             "Decode, resize and change pictures of size * size RGB pixels with the GIL released once, by so many\n"
             "threads. Returns for each what libjpeg-turbo complains of, or None; such a picture's pixels are anything.\n\n"
             "sources: of each the bytes of a JPEG, or (file descriptor, offset, length) of them.\n"
             "plans: 11 doubles each: the place in `out`; x, y, width and height of the region that may be seen, in\n"
             "    the image scaled by eighths / 8; eighths (1, 2, 4 or 8); left, top, right and bottom of the box in\n"
             "    the region that is shown; whether it is flipped.\n"
             "operations: n times 7 doubles each: which (see operate() in _pixels.c; -1: no more), and what it takes.\n"
             "out: writable memory of pictures, size * size * 3 bytes each.\n"
             "Raises ValueError where plans are none.");

static PyObject *decode_batch(PyObject *Py_UNUSED(self), PyObject *args) {
    PyObject *given, *result = NULL;
    Py_buffer plans, operations, out;
    int size, threads = 1;
    if (!PyArg_ParseTuple(args, "Oy*y*w*i|i", &given, &plans, &operations, &out, &size, &threads)) return NULL;
    PyObject *sources = PySequence_Fast(given, "sources are no sequence");
    Py_ssize_t count = sources == NULL ? 0 : PySequence_Fast_GET_SIZE(sources), planned = 0;
    Picture *pictures = sources == NULL ? NULL : PyMem_Calloc((size_t)count + 1, sizeof *pictures);
    Py_buffer *buffers = sources == NULL ? NULL : PyMem_Calloc((size_t)count + 1, sizeof *buffers);
    if (pictures == NULL || buffers == NULL) {
        if (sources != NULL) PyErr_NoMemory();
        goto done;
    }
    const Py_ssize_t each = OPERATION_VALUES * (Py_ssize_t)sizeof(double) * (count ? count : 1);
    if (size < 1 || size > LARGEST || threads < 1 || threads > THREADS || operations.len % each ||
        plans.len != count * PLAN_VALUES * (Py_ssize_t)sizeof(double)) {
        PyErr_SetString(PyExc_ValueError, "the size, the threads, the plans or the operations have no such number");
        goto done;
    }
    Batch batch = {pictures, count, size, (int)(operations.len / each), 0};
    for (; planned < count; planned++) {
        const double *plan = (const double *)plans.buf + planned * PLAN_VALUES;
        PyObject *source = PySequence_Fast_GET_ITEM(sources, planned);
        pictures[planned].operations = (const double *)operations.buf + planned * batch.operations * OPERATION_VALUES;
        if (plan_picture(&pictures[planned], &buffers[planned], source, plan, &out, size) < 0) goto done;
    }
    Py_BEGIN_ALLOW_THREADS;
    run_all(&batch, threads);
    Py_END_ALLOW_THREADS;
    result = messages(pictures, count);
done:
    for (Py_ssize_t n = 0; n < planned; n++) {
        if (buffers[n].obj != NULL) PyBuffer_Release(&buffers[n]);
    }
    PyMem_Free(buffers);
    PyMem_Free(pictures);
    Py_XDECREF(sources);
    PyBuffer_Release(&plans);
    PyBuffer_Release(&operations);
    PyBuffer_Release(&out);
    return result;
}

PyDoc_STRVAR(operate_doc, "operate(picture, side, operations)\n\n"
                          "Change side * side RGB pixels in place, by operations as those of decode_batch().\n"
                          "Raises ValueError where the picture is of another size, or there is no such operation.");

static PyObject *operate_on(PyObject *Py_UNUSED(self), PyObject *args) {
    Py_buffer picture, operations;
    int side, failed = 0;
    if (!PyArg_ParseTuple(args, "w*iy*", &picture, &side, &operations)) return NULL;
    const Py_ssize_t each = OPERATION_VALUES * (Py_ssize_t)sizeof(double), bytes = (Py_ssize_t)side * side * 3;
    if (side < 1 || side > LARGEST || picture.len != bytes || operations.len % each) {
        PyErr_Format(PyExc_ValueError, "a picture of %d x %d pixels has 3 bytes each, and %zd bytes were given", side,
                     side, picture.len);
        failed = 1;
    } else {
        Byte *spare = PyMem_Malloc((size_t)bytes + PADDING);
        if (spare == NULL) PyErr_NoMemory();
        failed = spare == NULL;
        for (Py_ssize_t n = 0; !failed && n < operations.len / each; n++) {
            failed = operate((const double *)operations.buf + n * OPERATION_VALUES, picture.buf, spare, side) < 0;
            if (failed) PyErr_SetString(PyExc_ValueError, "there is no such operation");
        }
        PyMem_Free(spare);
    }
    PyBuffer_Release(&picture);
    PyBuffer_Release(&operations);
    return failed ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(size_doc,
             "size(data) -> (width, height, simple)\n\n"
             "Width and height in pixels from the header, and whether decode_batch() takes this kind of JPEG.\n"
             "Raises ValueError where the header cannot be read.");

static PyObject *size(PyObject *Py_UNUSED(self), PyObject *argument) {
    Py_buffer data;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE) < 0) return NULL;
    char message[JMSG_LENGTH_MAX];
    unsigned found[3] = {0, 0, 0};
    int failed = read_size(message, data.buf, (size_t)data.len, found);
    PyBuffer_Release(&data);
    if (failed) return PyErr_Format(PyExc_ValueError, "%s", message);
    return Py_BuildValue("IIN", found[0], found[1], PyBool_FromLong((long)found[2]));
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
    char message[JMSG_LENGTH_MAX];
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
    failed = decode_region(message, data.buf, (size_t)data.len, region, (unsigned)eighths, out);
    Py_END_ALLOW_THREADS;
    if (failed) {
        PyErr_SetString(PyExc_ValueError, message);
        Py_CLEAR(pixels);
    }
done:
    PyBuffer_Release(&data);
    return pixels;
}

PyDoc_STRVAR(set_vectors_doc, "set_vectors(level)\n\n"
                              "Use at most plain instructions (0), AVX2 (1), or AVX-512 with VNNI (2, as at the start).");

static PyObject *set_vectors(PyObject *Py_UNUSED(self), PyObject *argument) {
    const long level = PyLong_AsLong(argument);
    if (level == -1 && PyErr_Occurred()) return NULL;
    vectors = (int)level;
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"set_vectors", set_vectors, METH_O, set_vectors_doc},
    {"size", size, METH_O, size_doc},
    {"decode_batch", decode_batch, METH_VARARGS, decode_batch_doc},
    {"operate", operate_on, METH_VARARGS, operate_doc},
    {"decode", decode, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_jpeg", "Decode regions of JPEG images.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModuleDef_Init(&module); }
