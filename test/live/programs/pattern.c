// pattern MIB MS [PROCESSES] [fork]: fills MIB mebibytes with numbers that follow from their place, then counts, a number every MS
// milliseconds, and looks at one mebibyte after another and at a page somewhere each time. PROCESSES more do the same without counting,
// in memory that they share with the first one until somebody writes; with `fork`, each number is looked for by a child. What isn't as
// it was: "WRONG …", and the end with status 99.
#include "say.h"
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define WORDS_PER_PAGE 512
#define PAGES_PER_MIB 256

static uint64_t *memory;
static uint64_t pages;

// Never zero, which is what memory that nobody filled reads as.
static uint64_t number_at(uint64_t place) {
  place ^= place >> 33, place *= 0xff51afd7ed558ccdu, place ^= place >> 33, place *= 0xc4ceb9fe1a85ec53u;
  return place | 1;
}

static void look_at(uint64_t page) {
  for (uint64_t place = page * WORDS_PER_PAGE; place < (page + 1) * WORDS_PER_PAGE; place++)
    if (memory[place] != number_at(place)) {
      say("WRONG page %llu: %016llx", (unsigned long long)page, (unsigned long long)memory[place]);
      _exit(99);
    }
}

static void look(uint64_t tick) {
  look_at(number_at(tick) % pages);
  for (uint64_t page = tick * PAGES_PER_MIB % pages, end = page + PAGES_PER_MIB; page < end; page++) look_at(page);
}

int main(int argc, char **argv) {
  pages = (uint64_t)(argc > 1 ? atol(argv[1]) : 16) * PAGES_PER_MIB;
  long ms = argc > 2 ? atol(argv[2]) : 10, processes = argc > 3 ? atol(argv[3]) : 0;
  int forks = argc > 4 && strcmp(argv[4], "fork") == 0;
  memory = mmap(0, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  for (uint64_t place = 0; place < pages * WORDS_PER_PAGE; place++) memory[place] = number_at(place);
  for (long i = 0; i < processes; i++)
    if (fork() == 0)
      for (uint64_t tick = (uint64_t)i * 7;; tick++) {
        memory[number_at(tick) % pages * WORDS_PER_PAGE] += 0; // its own copy of the page
        look(tick);
        rest(ms);
      }
  for (uint64_t tick = 1;; tick++) {
    if (forks) {
      int status = 0;
      pid_t child = fork();
      if (child < 0) fail("fork");
      if (child == 0) {
        look(tick);
        _exit(0);
      }
      if (waitpid(child, &status, 0) != child) fail("waitpid");
      if (status != 0) _exit(99);
    } else {
      look(tick);
    }
    say("%llu", (unsigned long long)tick);
    rest(ms);
  }
}
