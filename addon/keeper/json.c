#include "json.h"

#include <ctype.h>

struct json json_of(const char *text, size_t length) {
  return (struct json){.text = text, .at = text, .end = text + length};
}

static void fault(struct json *in, const char *what) {
  if (!in->wrong) in->wrong = what;
}

static int next(struct json *in) {
  while (in->at < in->end && (*in->at == ' ' || *in->at == '\t' || *in->at == '\n' || *in->at == '\r')) in->at++;
  return in->at < in->end ? (unsigned char)*in->at : -1;
}

static bool take(struct json *in, char wanted) {
  if (in->wrong || next(in) != wanted) return false;
  in->at++;
  return true;
}

static int hex4(struct json *in) {
  int number = 0;
  if (in->end - in->at < 4) return -1;
  for (int i = 0; i < 4; i++) {
    int c = (unsigned char)in->at[i];
    if (!isxdigit(c)) return -1;
    number = number * 16 + (isdigit(c) ? c - '0' : (c | 0x20) - 'a' + 10);
  }
  in->at += 4;
  return number;
}

static char *put_utf8(char *out, unsigned code) {
  if (code < 0x80) *out++ = (char)code;
  else if (code < 0x800) *out++ = (char)(0xc0 | code >> 6), *out++ = (char)(0x80 | (code & 63));
  else if (code < 0x10000)
    *out++ = (char)(0xe0 | code >> 12), *out++ = (char)(0x80 | (code >> 6 & 63)), *out++ = (char)(0x80 | (code & 63));
  else
    *out++ = (char)(0xf0 | code >> 18), *out++ = (char)(0x80 | (code >> 12 & 63)), *out++ = (char)(0x80 | (code >> 6 & 63)),
    *out++ = (char)(0x80 | (code & 63));
  return out;
}

/* An escape, `at` behind its backslash. NULL: none that there is. */
static char *unescape(struct json *in, char *out) {
  static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
  if (in->at >= in->end) return NULL;
  char c = *in->at++;
  const char *simple = c ? strchr(names, c) : NULL;
  if (simple) {
    *out++ = values[simple - names];
    return out;
  }
  if (c != 'u') return NULL;
  int code = hex4(in);
  if (code <= 0) return NULL; /* a NUL would end the string */
  if (code >= 0xd800 && code < 0xdc00) {
    if (in->end - in->at < 6 || in->at[0] != '\\' || in->at[1] != 'u') return NULL;
    in->at += 2;
    int low = hex4(in);
    if (low < 0xdc00 || low > 0xdfff) return NULL;
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  } else if (code >= 0xdc00 && code < 0xe000) {
    return NULL;
  }
  return put_utf8(out, (unsigned)code);
}

char *json_string(struct json *in) {
  if (!take(in, '"')) {
    fault(in, "a string is expected");
    return NULL;
  }
  const char *close = in->at; /* an upper bound for the length: no escape is shorter than what it stands for */
  while (close < in->end && *close != '"') close += *close == '\\' && close + 1 < in->end ? 2 : 1;
  char *text = allocate((size_t)(close - in->at) + 1), *out = text;
  while (in->at < in->end && *in->at != '"') {
    unsigned char c = (unsigned char)*in->at++;
    if (c == '\\') out = unescape(in, out);
    else if (c >= 0x20) *out++ = (char)c;
    else out = NULL;
    if (!out) {
      fault(in, "a string has a character or escape that JSON doesn't allow");
      free(text);
      return NULL;
    }
  }
  *out = 0;
  if (take(in, '"')) return text;
  fault(in, "a string has no end");
  free(text);
  return NULL;
}

void json_enter(struct json *in) {
  if (!take(in, '{')) fault(in, "an object is expected");
  if (++in->depth > JSON_DEPTH) fault(in, "nested too deep");
  in->opened = true;
}

char *json_member(struct json *in) {
  if (in->depth == 0) json_enter(in);
  if (in->wrong) return NULL;
  if (take(in, '}')) {
    in->depth--;
    in->opened = false;
    return NULL;
  }
  if (!in->opened && !take(in, ',')) {
    fault(in, "a comma or the end of the object is expected");
    return NULL;
  }
  in->opened = false;
  char *key = json_string(in);
  if (key && !take(in, ':')) {
    fault(in, "a colon is expected");
    free(key);
    return NULL;
  }
  return key;
}

static void skip_number(struct json *in) {
  if (in->at < in->end && *in->at == '-') in->at++;
  const char *digits = in->at;
  while (in->at < in->end && isdigit((unsigned char)*in->at)) in->at++;
  bool right = in->at > digits && (*digits != '0' || in->at == digits + 1);
  if (right && in->at < in->end && *in->at == '.') {
    digits = ++in->at;
    while (in->at < in->end && isdigit((unsigned char)*in->at)) in->at++;
    right = in->at > digits;
  }
  if (right && in->at < in->end && (*in->at | 0x20) == 'e') {
    in->at++;
    if (in->at < in->end && (*in->at == '+' || *in->at == '-')) in->at++;
    digits = in->at;
    while (in->at < in->end && isdigit((unsigned char)*in->at)) in->at++;
    right = in->at > digits;
  }
  if (!right) fault(in, "a value is expected");
}

void json_skip(struct json *in) {
  static const char *const words[] = {"true", "false", "null"};
  if (in->wrong) return;
  int c = next(in);
  if (c == '"') {
    free(json_string(in));
  } else if (c == '{') {
    unsigned outside = in->depth;
    json_enter(in);
    for (char *key; in->depth > outside && (key = json_member(in)); free(key)) json_skip(in);
  } else if (c == '[') {
    in->at++;
    if (++in->depth > JSON_DEPTH) fault(in, "nested too deep");
    if (!take(in, ']')) {
      do json_skip(in);
      while (take(in, ','));
      if (!take(in, ']')) fault(in, "a comma or the end of the list is expected");
    }
    in->depth--;
  } else {
    for (size_t i = 0; i < countof(words); i++) {
      size_t length = strlen(words[i]);
      if ((size_t)(in->end - in->at) >= length && !memcmp(in->at, words[i], length)) {
        in->at += length;
        return;
      }
    }
    skip_number(in);
  }
}

int json_end(struct json *in) {
  if (!in->wrong && in->depth > 0) fault(in, "the object has no end");
  if (!in->wrong && next(in) != -1) fault(in, "something follows the object");
  return in->wrong ? -EBADMSG : 0;
}

unsigned json_line(const struct json *in) {
  unsigned line = 1;
  for (const char *p = in->text; p < in->at; p++) line += *p == '\n';
  return line;
}
