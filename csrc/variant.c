#include "variant.h"

#include <stdio.h>

const char *fa_variant_kernel(const struct fa_variant *variant)
{
    static const char *const names[] = {
#define FA_NAME(kernel, name) name,
        FA_KERNELS(FA_NAME)
#undef FA_NAME
    };
    return names[variant->kernel];
}

static const struct {
    const char *constant;
    int kernels;
    const char *code;
    enum fa_code kind;
} FIELDS[] = {
#define FA_ROW(field, constant, kernels, code, kind) {constant, kernels, code, kind},
    FA_VARIANT_FIELDS(FA_ROW)
#undef FA_ROW
};

/* Whether the variant's kernel has the i-th field, and its value. */
static bool has_field(const struct fa_variant *variant, size_t i, int *value)
{
    const int values[] = {
#define FA_VALUE(field, constant, kernels, code, kind) variant->field,
        FA_VARIANT_FIELDS(FA_VALUE)
#undef FA_VALUE
    };
    *value = values[i];
    return FIELDS[i].kernels >> variant->kernel & 1;
}

void fa_variant_name(const struct fa_variant *variant, char name[FA_VARIANT_NAME_SIZE])
{
    static const char *const types[] = {"fp32", "fp16", "bf16"}; /* enum fa_dtype */
    size_t length = (size_t)snprintf(name, FA_VARIANT_NAME_SIZE, "%s", fa_variant_kernel(variant));
    for (size_t i = 0; i < FA_VARIANT_FIELD_COUNT; i++) {
        int value;
        if (!has_field(variant, i, &value) || (FIELDS[i].kind >= FA_FLAG && !value) ||
            (FIELDS[i].kind == FA_FACTOR && value == 1))
            continue;
        char number[16] = "";
        if (FIELDS[i].kind == FA_NUMBER || FIELDS[i].kind == FA_FACTOR)
            snprintf(number, sizeof number, "%d", value);
        else if (FIELDS[i].kind == FA_TEXT)
            snprintf(number, sizeof number, "%08x", (unsigned)value);
        length +=
            (size_t)snprintf(name + length, FA_VARIANT_NAME_SIZE - length, "%s%s", FIELDS[i].code,
                             FIELDS[i].kind == FA_TYPE ? types[value] : number);
    }
}

bool fa_variant_option(const struct fa_variant *variant, size_t i,
                       char option[FA_VARIANT_OPTION_SIZE])
{
    int value;
    if (!has_field(variant, i, &value))
        return false;
    snprintf(option, FA_VARIANT_OPTION_SIZE, "-D%s=%d", FIELDS[i].constant, value);
    return true;
}
