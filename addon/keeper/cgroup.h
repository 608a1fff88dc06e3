/* Cgroup directories on hosts with version 1, version 2 or both. Only what the launcher and cedanad's start need. */
#pragma once

#include "util.h"

/*
 * The `cgroup.procs` files of group `name` (a path below the root of a hierarchy) in every hierarchy that is
 * mounted and lets us make it: a NULL-terminated list that the caller frees with cgroup_free. `controllers_only`:
 * named hierarchies (version 1) are left out, and the unified one too where version 1 has controllers.
 */
char **cgroup_make(const char *name, bool controllers_only, int *error);
void cgroup_free(char **procs);
/* Joins the calling process; all hierarchies or an error. */
int cgroup_join(const char *name);
