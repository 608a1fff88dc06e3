/* The parts of the wrapper cedana-runtime. runtime.c has the contract. */
#pragma once
#include "util.h"

/* What the command line says before the command, and what the configuration says. */
struct runtime {
  /* configuration */
  const char *engine;      /* name or path */
  const char *engine_from; /* where that name comes from, for messages */
  char *engine_path;       /* found */
  /* the caller's global options */
  const char *root, *log;
  bool log_json;
  /* The caller's arguments without ours; argv[0] is the engine's name. */
  char **argv;
  int argc;
  int command; /* index of the command in argv; 0: none, or there are options that we don't know */
};
extern struct runtime runtime;
/* From the configuration, where the environment says nothing; else NULL. */
extern const char *runtime_run_directory;

/* ---- runtime.c ---- */
bool runtime_in_user_namespace(void);
/* NULL: the command line names none. */
const char *runtime_container_id(void);
_Noreturn void runtime_execute(const char *path, char **argv, char **env);

/* ---- runtime-config.c ---- */
/* /etc/cedana/runtime.json, or the file that is named. A fault ends the program. */
void runtime_config_load(const char *named);
/* Into our own environment: what it says for a cedanad that we start. */
void runtime_config_export(void);

/* ---- runtime-log.c ---- */
/* Says it on stderr and in the caller's --log file, in its --log-format, and ends the program with 1. */
_Noreturn void runtime_fail(const char *text, ...) __attribute__((format(printf, 1, 2)));
/* The same without ending, for messages that come from cedanad. */
void runtime_say_error(const char *text);

/* ---- runtime-options.c: checkpoint and restore ---- */
struct runtime_option {
  const char *name;
  const char *value; /* what stands for the value in the help; NULL: it takes none */
  const char *help;
};
/* Answers --help, and a command line that is wrong, without asking anybody; returns when there is something to do. */
void runtime_options_check(const char *command, char **arguments);

/* ---- runtime-ask.c ---- */
/* The command is cedanad's to decide; never returns. */
_Noreturn void runtime_ask(void);
/* Directory of the engine's state: the caller's --root, or the engine's own default. */
char *runtime_state_root(void);
/* By what the caller's root and id say: the file that makes a container ours. The caller frees. */
char *runtime_marker(const char *id);
