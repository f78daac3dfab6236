#include "explain.h"

#include "launch.h"
#include "platform.h"
#include "state.h"

static PyObject *reasons_of(const struct fa_plan *plan)
{
    PyObject *reasons = PyDict_New();
    for (int i = 0; reasons && i < plan->reason_count; i++) {
        PyObject *why = PyUnicode_FromString(plan->reasons[i].why);
        if (!why || PyDict_SetItemString(reasons, plan->reasons[i].choice, why) < 0)
            Py_CLEAR(reasons);
        Py_XDECREF(why);
    }
    return reasons;
}

static PyObject *explain_cpu(void)
{
    return Py_BuildValue("{s:s,s:i,s:{s:s,s:s,s:s}}", "kernel", "cpu", "threads", fa_cpu_count(),
                         "reasons", "kernel", "CPU tensors run the reference implementation in C",
                         "num_splits", "the reference implementation splits no keys", "pack_gqa",
                         "of no concern: it never changes a result, and here no speed");
}

/* (kernel, variant, options): what the compiler makes a kernel of. */
static PyObject *kernel_of(const struct fa_variant *variant)
{
    char name[FA_VARIANT_NAME_SIZE];
    fa_variant_name(variant, name);
    return Py_BuildValue("(ssN)", fa_variant_kernel(variant), name, fa_kernels_options(variant));
}

static PyObject *explain_plan(const struct fa_plan *plan)
{
    const bool split = plan->parts > 1;
    const int64_t floats = split ? plan->combine.out_floats + plan->combine.lse_floats : 0;
    char name[FA_VARIANT_NAME_SIZE];
    fa_variant_name(&plan->variant, name);
    return Py_BuildValue("{s:s,s:s,s:N,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:L,s:N,s:O,s:N}",
                         "kernel", fa_variant_kernel(&plan->variant), "variant", name, "options",
                         fa_kernels_options(&plan->variant), "tile_m", plan->tile_m, "tile_n",
                         plan->variant.tile_n, "warps", plan->variant.warps, "stages",
                         plan->variant.stages, "blocks", plan->blocks, "group_heads",
                         plan->group_heads, "smem_bytes", plan->smem_bytes, "smem_request",
                         plan->smem_request, "blocks_per_sm", plan->blocks_per_sm, "num_splits",
                         plan->parts, "workspace_bytes", (long long)floats * 4, "combine",
                         split ? kernel_of(&plan->combine.variant) : Py_NewRef(Py_None), "pack_gqa",
                         plan->variant.pack_gqa ? Py_True : Py_False, "reasons", reasons_of(plan));
}

PyObject *fa_explain(struct fa_state *state, const struct fa_problem *problem, int arch)
{
    if (!arch && problem->q.device_type == FA_CPU)
        return explain_cpu();
    struct fa_plan plan;
    if (fa_launch_plan(state, &problem->shape, problem->q.device_id, arch, &plan) < 0)
        return NULL;
    return explain_plan(&plan);
}

/* [(kernel, variant, options), ...] of the steps that are needed. */
static PyObject *kernels_of(const struct fa_backward_plan *plan)
{
    const struct fa_step *const steps[] = {&plan->preprocess, &plan->main, &plan->dq,
                                           &plan->dk,         &plan->dv,   &plan->dsink};
    PyObject *kernels = PyList_New(0);
    for (size_t i = 0; kernels && i < sizeof steps / sizeof *steps; i++) {
        if (steps[i]->blocks == 0)
            continue;
        PyObject *kernel = kernel_of(&steps[i]->variant);
        if (!kernel || PyList_Append(kernels, kernel) < 0)
            Py_CLEAR(kernels);
        Py_XDECREF(kernel);
    }
    return kernels;
}

PyObject *fa_explain_backward(struct fa_state *state, const struct fa_problem *problem,
                              bool deterministic, int arch)
{
    const struct fa_tensor *q = &problem->q;
    if ((!arch && q->device_type == FA_CPU) || fa_shape_is_empty(&problem->shape))
        return Py_BuildValue("{s:[]}", "kernels");
    const struct fa_backward_options options = {
        .deterministic = deterministic,
        .tma_strides = fa_tensor_has_tma_strides(q),
        .has_sink = problem->sink.object,
    };
    struct fa_backward_plan plan;
    if (fa_launch_plan_backward(state, &problem->shape, &options, q->device_id, arch, &plan) < 0)
        return NULL;
    const struct fa_variant *main = &plan.main.variant;
    return Py_BuildValue("{s:N,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:L,s:O}", "kernels",
                         kernels_of(&plan), "tile_m", main->tile_m, "tile_n", plan.tile_n, "warps",
                         main->warps, "blocks", plan.main.blocks, "parts", plan.q_splits,
                         "smem_bytes", plan.smem_bytes, "smem_request", plan.main.smem_request,
                         "blocks_per_sm", plan.blocks_per_sm, "workspace_bytes",
                         (long long)plan.workspace * 4, "tma", main->tma ? Py_True : Py_False);
}

PyObject *fa_explain_devices(struct fa_state *state)
{
    struct fa_driver *driver = &state->driver;
    if (fa_settings_read(&state->settings) < 0 ||
        fa_driver_open(driver, state->settings.driver) < 0)
        return NULL;
    PyObject *devices = PyList_New(driver->device_count);
    for (int i = 0; devices && i < driver->device_count; i++) {
        const struct fa_device *device = &driver->devices[i].device;
        PyObject *entry = Py_BuildValue(
            "{s:s,s:i,s:i,s:i,s:i,s:i}", "name", driver->devices[i].name, "arch", device->arch,
            "sms", device->sms, "smem_per_block", device->smem_per_block, "smem_per_sm",
            device->smem_per_sm, "l2_bytes", device->l2_bytes);
        if (!entry || PyList_SetItem(devices, i, entry) < 0)
            Py_CLEAR(devices);
    }
    return devices ? Py_BuildValue("iN", driver->version, devices) : NULL;
}
