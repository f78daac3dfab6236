#include "explain.h"

#include "cpu_threads.h"
#include "planning.h"

/* Steals the reference to `value`. 0, or -1 with the exception set. */
static int set_item(PyObject *dict, const char *name, PyObject *value)
{
    const int status = value ? PyDict_SetItemString(dict, name, value) : -1;
    Py_XDECREF(value);
    return status;
}

static PyObject *reasons_of(const struct fa_plan *plan)
{
    PyObject *reasons = PyDict_New();
    for (int i = 0; reasons && i < plan->reason_count; i++)
        if (set_item(reasons, plan->reasons[i].choice, PyUnicode_FromString(plan->reasons[i].why)) <
            0)
            Py_CLEAR(reasons);
    return reasons;
}

/* (kernel, variant, options, blocks, threads): what the compiler makes a kernel of, and its grid.
 */
static PyObject *step_of(const struct fa_step *step)
{
    char name[FA_VARIANT_NAME_SIZE];
    fa_variant_name(&step->variant, name);
    return Py_BuildValue("(ssNii)", fa_variant_kernel(&step->variant), name,
                         fa_variant_options(&step->variant), step->blocks, step->threads);
}

static PyObject *steps_of(const struct fa_plan *plan)
{
    PyObject *steps = PyList_New(plan->step_count);
    for (int i = 0; steps && i < plan->step_count; i++) {
        PyObject *step = step_of(&plan->steps[i]);
        if (!step || PyList_SetItem(steps, i, step) < 0)
            Py_CLEAR(steps);
    }
    return steps;
}

/* The plan's numbers by name; those of the other direction are not there. */
static int set_numbers(PyObject *dict, enum fa_direction direction, const struct fa_plan *plan)
{
    const struct fa_step *main = &plan->steps[plan->main];
    const struct fa_variant *variant = &main->variant;
    const bool is_forward = direction == FA_FORWARD;
    const struct {
        const char *name;
        long long value;
        bool is_there;
    } numbers[] = {
        {"main_step", plan->main, true},
        {"tile_m", plan->tile_m, true},
        {"tile_n", plan->tile_n, true},
        {"warps", variant->warps, true},
        {"stages", variant->stages, true},
        {"group_heads", plan->group_heads, true},
        {"num_splits", plan->splits, is_forward},
        {"q_splits", plan->splits, !is_forward},
        {"smem_bytes", plan->smem_bytes, true},
        {"smem_request", main->smem_request, true},
        {"blocks_per_sm", plan->blocks_per_sm, true},
        {"workspace_bytes", (long long)plan->workspace.size * 4, true},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].is_there &&
            set_item(dict, numbers[i].name, PyLong_FromLongLong(numbers[i].value)) < 0)
            return -1;
    if (is_forward && set_item(dict, "pack_gqa", PyBool_FromLong(variant->pack_gqa)) < 0)
        return -1;
    const bool tma = is_forward ? variant->kernel == FA_KERNEL_FORWARD_TMA : variant->tma;
    return set_item(dict, "tma", PyBool_FromLong(tma));
}

static PyObject *explain_plan(enum fa_direction direction, const struct fa_plan *plan)
{
    PyObject *dict = PyDict_New();
    if (!dict || set_item(dict, "steps", steps_of(plan)) < 0 ||
        set_numbers(dict, direction, plan) < 0 || set_item(dict, "reasons", reasons_of(plan)) < 0)
        Py_CLEAR(dict);
    return dict;
}

static PyObject *explain_cpu(void)
{
    const int threads = fa_cpu_thread_count();
    if (threads < 0)
        return NULL;
    return Py_BuildValue("{s:i,s:{s:s}}", "threads", threads, "reasons", "kernel",
                         "CPU tensors run the reference implementation in C, which has no tiles, "
                         "splits nothing and packs nothing");
}

static PyObject *explain_nothing(void)
{
    return Py_BuildValue("{s:{s:s}}", "reasons", "kernel",
                         "no query meets a key: gradients are zeros, and nothing is launched");
}

PyObject *fa_explain(struct fa_state *state, const struct fa_problem *problem,
                     enum fa_direction direction)
{
    const int arch = problem->options.arch;
    if (direction == FA_BACKWARD && fa_problem_check_differentiable(problem) < 0)
        return NULL;
    if (!arch && problem->q.device_type == FA_DEVICE_CPU)
        return explain_cpu();
    if (direction == FA_BACKWARD && fa_shape_is_empty(&problem->shape))
        return explain_nothing();
    struct fa_plan_input input = fa_planning_input(problem, direction, NULL);
    struct fa_plan plan;
    if (fa_planning_set_may_split(state, problem, problem->q.device_id, arch, &input) < 0 ||
        fa_planning_make(state, &input, problem->q.device_id, arch, &plan) < 0 ||
        fa_planning_fit(problem, &input, &plan) < 0)
        return NULL;
    return explain_plan(direction, &plan);
}

PyObject *fa_explain_counts(const struct fa_state *state)
{
    return Py_BuildValue("{s:L,s:n}", "plans", state->plans.made, "kernels",
                         (Py_ssize_t)state->kernels.count);
}

PyObject *fa_explain_device(const char *name, const struct fa_device *device)
{
    return Py_BuildValue("{s:s,s:i,s:i,s:i,s:i,s:i}", "name", name, "arch", device->arch, "sms",
                         device->sms, "smem_per_block", device->smem_per_block, "smem_per_sm",
                         device->smem_per_sm, "l2_bytes", device->l2_bytes);
}

PyObject *fa_explain_devices(struct fa_state *state)
{
    struct fa_driver *driver = &state->driver;
    if (fa_settings_read(&state->settings) < 0 ||
        fa_driver_open(driver, state->settings.driver) < 0)
        return NULL;
    PyObject *devices = PyList_New(driver->device_count);
    for (int i = 0; devices && i < driver->device_count; i++) {
        const struct fa_cuda_device *cuda = &driver->devices[i];
        PyObject *entry = fa_explain_device(cuda->name, &cuda->device);
        if (!entry || PyList_SetItem(devices, i, entry) < 0)
            Py_CLEAR(devices);
    }
    return devices ? Py_BuildValue("iN", driver->version, devices) : NULL;
}
