/* count_reads.c: preloaded into a process of test_bytes.py, it counts what crosses from ggml's backends to the host,
 * whoever asks for it: the two functions stand in front of ggml's own (ggml-backend.h), which do the work. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>

static long long n_bytes, n_largest;

static void note(size_t size) {
    n_bytes += (long long) size;
    n_largest = (long long) size > n_largest ? (long long) size : n_largest;
}

/* ggml is loaded into a scope of its own, where RTLD_NEXT does not look */
static void * ggml_symbol(const char * name) {
    void * library = dlopen("libggml-base.so.0", RTLD_LAZY | RTLD_NOLOAD);
    void * found   = library != NULL ? dlsym(library, name) : NULL;
    if (found == NULL) {
        abort();
    }
    return found;
}

void ggml_backend_tensor_get(const void * tensor, void * data, size_t offset, size_t size) {
    static void (*real)(const void *, void *, size_t, size_t);
    if (real == NULL) {
        *(void **) &real = ggml_symbol("ggml_backend_tensor_get");
    }
    note(size);
    real(tensor, data, offset, size);
}

void ggml_backend_tensor_get_async(void * backend, const void * tensor, void * data, size_t offset, size_t size) {
    static void (*real)(void *, const void *, void *, size_t, size_t);
    if (real == NULL) {
        *(void **) &real = ggml_symbol("ggml_backend_tensor_get_async");
    }
    note(size);
    real(backend, tensor, data, offset, size);
}

void count_reset(void) {
    n_bytes = n_largest = 0;
}

long long count_bytes(void) {
    return n_bytes;
}

long long count_largest(void) {
    return n_largest;
}
