/* The cheap half of flash_attn_sm120/following.py: whether a call is surely one that torch does not
 * follow. */
#ifndef FA_FOLLOWING_H
#define FA_FOLLOWING_H

#include <Python.h>

#define FA_MAX_QUESTIONS 8

/* The arguments of follow(); all NULL before it is called: then no call is followed. */
struct fa_following {
    PyObject *plain_types; /* tuple of tensor types that take no part in dispatch */
    PyObject *questions;   /* tuple of functions of torch: is one true, torch may follow */
    PyObject *forward_ad;  /* the namespace of torch.autograd.forward_ad, which has the level */
    PyObject *level;       /* "_current_level" */
    PyObject *is_neg;      /* "is_neg" */
};

/* Takes what follow() was given. 0, or -1 with TypeError set. */
int fa_following_set(struct fa_following *following, PyObject *plain_types, PyObject *questions,
                     PyObject *forward_ad);

/* 1 where every tensor is plain (NULL counts as that) and torch has nothing switched on by which it
 * follows calls; 0 where Python has to look closer; -1 with the exception set. */
int fa_following_is_plain_call(const struct fa_following *following, PyObject *const *tensors,
                               int count);

int fa_following_traverse(struct fa_following *following, visitproc visit, void *arg);
void fa_following_clear(struct fa_following *following);

#endif
