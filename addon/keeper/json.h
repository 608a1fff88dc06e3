/*
 * A strict reader of JSON, as far as the wrapper needs one: objects whose members are looked at one after another, strings
 * and booleans, and everything else skipped (but checked). No tree is built, nothing is kept.
 *
 *   struct json in = json_of(text, length);
 *   for (char *key; (key = json_member(&in)); free(key))
 *     if (!strcmp(key, "engine")) engine = json_string(&in); else json_skip(&in);
 *   if (json_end(&in) < 0) … in.wrong says what, in.at where
 *
 * Source: RFC 8259. Refused beside what it refuses: a NUL in a string, nesting deeper than JSON_DEPTH.
 */
#pragma once
#include "util.h"

#define JSON_DEPTH 64

struct json {
  const char *text, *at, *end;
  const char *wrong; /* the first fault, or NULL; from then on everything fails */
  unsigned depth;    /* objects that json_member is in */
  bool opened;       /* the object's brace has just been read: no comma yet */
};

struct json json_of(const char *text, size_t length);
/*
 * The next member's key, which the caller frees; the value must then be read (json_string …, json_skip, or json_member for an object).
 * NULL at the end of the object, or when something is wrong. The first call enters the object.
 */
char *json_member(struct json *in);
/* Enters an object that is a member's value; json_member then returns its members. Anything else: wrong. */
void json_enter(struct json *in);
/* A string, which the caller frees; NULL: it is none. */
char *json_string(struct json *in);
void json_skip(struct json *in);
/* 0 when all was read and right; -EBADMSG. */
int json_end(struct json *in);
/* Line of in->at, from 1. */
unsigned json_line(const struct json *in);
