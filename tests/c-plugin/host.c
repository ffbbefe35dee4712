// A host in C: loads a library, runs one node on a tensor and says what came of it.
//
//     host LIBRARY CLASS SOCKET
//
// With -DLATER=1 it is a host of a later minor version, which has more at the end of its own table.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node_plugin.h"

#ifndef LATER
#define LATER 0
#endif

enum { VALUES = 2 * 4 * 4 * 3 };

static int deletions;
static unsigned calls;

static void delete_given(DLManagedTensorVersioned *managed) {
    deletions++;
    free(managed->dl_tensor.data);
    free(managed);
}

static DLManagedTensorVersioned *new_tensor(void) {
    static int64_t shape[4] = {2, 4, 4, 3};
    DLManagedTensorVersioned *managed = calloc(1, sizeof *managed);
    float *values = malloc(VALUES * sizeof *values);
    if (managed == NULL || values == NULL) {
        exit(2);
    }
    for (int i = 0; i < VALUES; i++) {
        values[i] = (float)i / VALUES;
    }
    managed->version.major = 1;
    managed->version.minor = 1;
    managed->deleter = delete_given;
    managed->flags = 1; // nobody writes it, so nobody has to copy it
    managed->dl_tensor.data = values;
    managed->dl_tensor.device.device_type = 1;
    managed->dl_tensor.ndim = 4;
    managed->dl_tensor.dtype.code = 2;
    managed->dl_tensor.dtype.bits = 32;
    managed->dl_tensor.dtype.lanes = 1;
    managed->dl_tensor.shape = shape;
    return managed;
}

static void count(void *context, const char *text, size_t length) {
    (void)text;
    *(size_t *)context += length;
}

struct results {
    size_t n;
    NodePluginValue first;
};

static void push(void *context, NodePluginValue value) {
    struct results *results = context;
    if (results->n++ == 0) {
        results->first = value;
    }
}

static int32_t is_canceled(void *context) {
    (void)context;
    calls++;
    return 0;
}

static void progress(void *context, const char *stage, uint64_t done, uint64_t total, const char *text) {
    (void)context, (void)stage, (void)done, (void)total, (void)text;
    calls++;
}

static void preview(void *context, DLManagedTensorVersioned *picture, const char *series, const char *label) {
    (void)context, (void)series, (void)label;
    picture->deleter(picture);
}

static void metric(void *context, const char *series, double x, double y) {
    (void)context, (void)series, (void)x, (void)y;
    calls++;
}

static void log_line(void *context, uint32_t level, const char *text) {
    (void)context, (void)level, (void)text;
    calls++;
}

static void saved(void *context, const char *path) { (void)context, (void)path; }

static const NodePluginExtension *no_extension(void *context, const char *id) {
    (void)context, (void)id;
    return NULL;
}

struct host {
    NodePluginHost known;
#if LATER
    void (*more)(void);
#endif
};

static int fail(const char *what, const NodePluginError *error) {
    fprintf(stderr, "%s: %s\n", what, error != NULL ? error->message : "");
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        return fail("host LIBRARY CLASS SOCKET", NULL);
    }
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    const NodePluginTable *(*entry)(void) = NULL;
    if (library != NULL) {
        *(void **)&entry = dlsym(library, "node_plugin");
    }
    if (entry == NULL) {
        return fail(dlerror(), NULL);
    }
    const NodePluginTable *table = entry();
    if (memcmp(table->magic, NODE_PLUGIN_MAGIC, sizeof NODE_PLUGIN_MAGIC) != 0 || table->major != NODE_PLUGIN_MAJOR
        || table->struct_size < sizeof(NodePluginTable)) {
        return fail("this is no table that this host can use", NULL);
    }
    NodePluginError error = {{0}, {0}};
    size_t length = 0;
    NodePluginSink json = {.context = &length, .write = count};
    if (table->describe(json, &error) != NODE_PLUGIN_OK || length == 0) {
        return fail("it does not describe itself", &error);
    }
    NodePluginNode *node = table->node_new(argv[2], &error);
    if (node == NULL || table->node_validate(node, "{}", &error) != NODE_PLUGIN_OK) {
        return fail("the node cannot be made", &error);
    }
    DLManagedTensorVersioned *given = new_tensor();
    const void *data = given->dl_tensor.data;
    NodePluginInput input = {.name = argv[3], .value = {.kind = NODE_PLUGIN_TENSOR, .tensor = given}};
    struct host host = {.known = {
        .struct_size = sizeof(struct host),
        .minor = NODE_PLUGIN_MINOR + LATER,
        .node_id = "1",
        .output_dir = ".",
        .work_dir = "",
        .is_canceled = is_canceled,
        .progress = progress,
        .preview = preview,
        .metric = metric,
        .log = log_line,
        .saved = saved,
        .extension = no_extension,
    }};
    struct results results = {0};
    NodePluginValueSink outputs = {.context = &results, .push = push};
    if (table->node_run(node, &input, 1, "{}", &host.known, outputs, &error) != NODE_PLUGIN_OK) {
        return fail("the node does not run", &error);
    }
    if (input.value.kind == NODE_PLUGIN_TENSOR) {
        given->deleter(given);
    }
    table->node_free(node);
    if (results.n == 0 || results.first.kind != NODE_PLUGIN_TENSOR) {
        return fail("it returned no tensor", NULL);
    }
    DLManagedTensorVersioned *result = results.first.tensor;
    const char *first = (const char *)result->dl_tensor.data + result->dl_tensor.byte_offset;
    const int is_same = first == data;
    float value;
    memcpy(&value, first + 5 * sizeof value, sizeof value);
    const int is_right = value == 5.0f / VALUES;
    result->deleter(result);
    printf("%s 1.%u ran in a host 1.%u: %s memory, %s values, %d of 1 tensors freed, %u calls\n", table->name,
           (unsigned)table->minor, (unsigned)host.known.minor, is_same ? "the same" : "other",
           is_right ? "the same" : "other", deletions, calls);
    return 0;
}
