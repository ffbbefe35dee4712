// A plugin of one node in C: masks at a threshold. Where nobody else holds the mask it is written in place.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "node_plugin.h"

static const char DESCRIPTION[] =
    "{\"name\": \"threshold\", \"version\": \"0.1.0\", \"nodes\": [{"
    "\"class\": \"Threshold\", \"display_name\": \"Threshold\", \"category\": \"examples\","
    "\"description\": \"Masks that are 0 or 1\","
    "\"inputs\": [{\"name\": \"masks\", \"port\": \"MASK\", \"tooltip\": \"[batch, height, width]\"}],"
    "\"widgets\": [{\"name\": \"threshold\", \"tooltip\": \"What exceeds it is 1\","
    "  \"kind\": {\"type\": \"float\", \"default\": 0.5, \"min\": 0.0, \"max\": 1.0, \"step\": 0.01}}],"
    "\"outputs\": [{\"name\": \"masks\", \"port\": \"MASK\", \"tooltip\": \"0 or 1\"},"
    "  {\"name\": \"count\", \"port\": \"INT\", \"tooltip\": \"How many values are 1\"}]}]}";

static const char NODE[] = "the only state of a node is that it is there";

static uint32_t failed(NodePluginError *error, uint32_t code, const char *input, const char *message) {
    if (error != NULL) {
        snprintf(error->input, sizeof error->input, "%s", input);
        snprintf(error->message, sizeof error->message, "%s", message);
    }
    return code;
}

static uint32_t describe(NodePluginSink json, NodePluginError *error) {
    (void)error;
    json.write(json.context, DESCRIPTION, sizeof DESCRIPTION - 1);
    return NODE_PLUGIN_OK;
}

static const NodePluginExtension *no_extension(const char *id) {
    (void)id;
    return NULL;
}

static NodePluginNode *node_new(const char *class_name, NodePluginError *error) {
    if (strcmp(class_name, "Threshold") != 0) {
        failed(error, NODE_PLUGIN_INVALID_INPUT, "", "this plugin has the class Threshold alone");
        return NULL;
    }
    char *node = malloc(sizeof NODE);
    if (node == NULL) {
        failed(error, NODE_PLUGIN_OUT_OF_MEMORY, "", "there is no memory for a node");
        return NULL;
    }
    memcpy(node, NODE, sizeof NODE);
    return (NodePluginNode *)node;
}

static void node_free(NodePluginNode *node) { free(node); }

// The host has checked the bounds. A whole parser would be more than this object needs: {"threshold":0.5}.
static double threshold_of(const char *parameters) {
    const char *name = strstr(parameters, "\"threshold\"");
    const char *colon = name != NULL ? strchr(name, ':') : NULL;
    return colon != NULL ? strtod(colon + 1, NULL) : 0.5;
}

static uint32_t node_validate(NodePluginNode *node, const char *parameters, NodePluginError *error) {
    (void)node;
    return threshold_of(parameters) == 0.25
        ? failed(error, NODE_PLUGIN_INVALID_INPUT, "threshold", "a quarter is what this node does not like")
        : NODE_PLUGIN_OK;
}

static uint32_t node_fingerprint(NodePluginNode *node, const char *parameters, NodePluginSink text,
                                 NodePluginError *error) {
    (void)node, (void)parameters, (void)text, (void)error;
    return NODE_PLUGIN_OK;
}

static const NodePluginExtension *no_node_extension(NodePluginNode *node, const char *id) {
    (void)node, (void)id;
    return NULL;
}

static int is_row_major(const DLTensor *tensor) {
    int64_t expected = 1;
    for (int i = tensor->ndim - 1; tensor->strides != NULL && i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != expected) {
            return 0;
        }
        expected *= tensor->shape[i];
    }
    return 1;
}

struct own_tensor {
    DLManagedTensorVersioned managed;
    int64_t shape[3];
};

static void delete_own(DLManagedTensorVersioned *managed) {
    free(managed->dl_tensor.data);
    free(managed);
}

// Memory of the shape of another mask.
static DLManagedTensorVersioned *new_like(const DLTensor *other, size_t count) {
    struct own_tensor *own = calloc(1, sizeof *own);
    float *values = own != NULL ? malloc(count * sizeof *values + 1) : NULL;
    if (values == NULL) {
        free(own);
        return NULL;
    }
    memcpy(own->shape, other->shape, sizeof own->shape);
    own->managed.version.major = 1;
    own->managed.version.minor = 1;
    own->managed.deleter = delete_own;
    own->managed.flags = 2; // nobody else has it
    own->managed.dl_tensor = *other;
    own->managed.dl_tensor.data = values;
    own->managed.dl_tensor.byte_offset = 0;
    own->managed.dl_tensor.shape = own->shape;
    own->managed.dl_tensor.strides = NULL;
    return &own->managed;
}

struct own_json {
    NodePluginJson json;
    char text[32];
};

static void delete_json(NodePluginJson *json) { free(json); }

static uint32_t node_run(NodePluginNode *node, NodePluginInput *inputs, size_t n_inputs, const char *parameters,
                         const NodePluginHost *host, NodePluginValueSink outputs, NodePluginError *error) {
    if (memcmp(node, NODE, sizeof NODE) != 0) {
        return failed(error, NODE_PLUGIN_INTERNAL, "", "this is no node");
    }
    NodePluginValue *mask = NULL;
    for (size_t i = 0; i < n_inputs; i++) {
        if (strcmp(inputs[i].name, "masks") == 0) {
            mask = &inputs[i].value;
        }
    }
    if (mask == NULL || mask->kind != NODE_PLUGIN_TENSOR) {
        return failed(error, NODE_PLUGIN_INVALID_INPUT, "masks", "the input masks takes a tensor");
    }
    DLManagedTensorVersioned *given = mask->tensor;
    const DLTensor *tensor = &given->dl_tensor;
    if (given->version.major != 1 || tensor->device.device_type != 1 || tensor->ndim != 3 || tensor->dtype.code != 2
        || tensor->dtype.bits != 32 || !is_row_major(tensor)) {
        return failed(error, NODE_PLUGIN_INVALID_INPUT, "masks",
                      "the input masks takes [batch, height, width] of 32-bit floats, row-major, in memory");
    }
    size_t count = 1;
    for (int i = 0; i < 3; i++) {
        count *= (size_t)tensor->shape[i];
    }
    DLManagedTensorVersioned *result = given;
    if (given->flags & 1) {
        result = new_like(tensor, count);
        if (result == NULL) {
            return failed(error, NODE_PLUGIN_OUT_OF_MEMORY, "", "there is no memory for the masks");
        }
    } else {
        mask->kind = NODE_PLUGIN_NONE; // taken
        mask->tensor = NULL;
        host->log(host->context, NODE_PLUGIN_LOG_DEBUG, "in place");
    }
    const float *from = (const float *)((const char *)given->dl_tensor.data + given->dl_tensor.byte_offset);
    float *to = (float *)((char *)result->dl_tensor.data + result->dl_tensor.byte_offset);
    const double threshold = threshold_of(parameters);
    size_t above = 0;
    for (size_t i = 0; i < count; i++) {
        if (i % 65536 == 0) {
            if (host->is_canceled(host->context)) {
                result->deleter(result);
                return failed(error, NODE_PLUGIN_CANCELED, "", "canceled");
            }
            host->progress(host->context, "threshold", i, count, "");
        }
        to[i] = from[i] > threshold ? 1.0f : 0.0f;
        above += to[i] > 0.0f;
    }
    host->metric(host->context, "above", 0.0, (double)above);
    NodePluginValue masks = {.kind = NODE_PLUGIN_TENSOR, .tensor = result};
    outputs.push(outputs.context, masks);
    struct own_json *number = calloc(1, sizeof *number);
    if (number == NULL) {
        return failed(error, NODE_PLUGIN_OUT_OF_MEMORY, "", "there is no memory for a number");
    }
    number->json.text = number->text;
    number->json.length = (size_t)snprintf(number->text, sizeof number->text, "%zu", above);
    number->json.deleter = delete_json;
    NodePluginValue json = {.kind = NODE_PLUGIN_JSON, .json = &number->json};
    outputs.push(outputs.context, json);
    return NODE_PLUGIN_OK;
}

// With -DLATER=1 the table is that of a later minor version, which has more at its end.
#ifndef LATER
#define LATER 0
#endif

struct table {
    NodePluginTable known;
#if LATER
    void (*more)(void);
#endif
};

static const struct table TABLE = {
    .known = {
        .magic = NODE_PLUGIN_MAGIC,
        .struct_size = sizeof(struct table),
        .major = NODE_PLUGIN_MAJOR,
        .minor = NODE_PLUGIN_MINOR + LATER,
        .name = "threshold",
        .version = "0.1.0",
        .describe = describe,
        .extension = no_extension,
        .node_new = node_new,
        .node_free = node_free,
        .node_validate = node_validate,
        .node_fingerprint = node_fingerprint,
        .node_run = node_run,
        .node_extension = no_node_extension,
    },
};

const NodePluginTable *node_plugin(void) { return &TABLE.known; }
