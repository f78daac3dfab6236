/* The environment variables that the C code reads; the README has the table of all of them. */
#ifndef FA_SETTINGS_H
#define FA_SETTINGS_H

#include <stdbool.h>

struct fa_settings {
    bool ready;
    int limits_arch; /* FA_SM120_LIMITS: keep within this architecture's limits; 0: the device's */
    int plan_as;     /* FA_SM120_PLAN_AS: plan with this architecture's rows; 0: the device's */
    int plan_kind;   /* and those of such a card, enum fa_card_kind */
    int tensor_repeat; /* FA_SM120_TENSOR_REPEAT: how often an mma is issued; 0: once */
    int check;         /* FA_SM120_CHECK: look at lengths and pages of CUDA calls first */
    char driver[512];  /* FA_SM120_DRIVER: library in place of the CUDA driver, which is given PTX;
                         "": the driver */
};

/* Reads the environment, once. 0, or -1 with ValueError set where a variable has an unknown value;
 * the next call then reads it again. */
int fa_settings_read(struct fa_settings *settings);

#endif
