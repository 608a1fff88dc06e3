# names.list to the source that depends on it. `what` says which: trampolines.S or names.h. Functions that are written in C (`own`) get
# no trampoline.
BEGIN {
  count = 0
  split(own, list, " ")
  for (i in list) written[list[i]] = 1
  if (what == "names.h") print "/* Made from names.list. */\n#define NAMES(X) \\"
}
/^#/ || NF == 0 { next }
!/^cu[A-Z][A-Za-z0-9_]*$/ { print "names.list, line " NR ": " $0 " is no name" > "/dev/stderr"; failed = 1; exit }
$1 in seen { print "names.list, line " NR ": " $1 " is there twice" > "/dev/stderr"; failed = 1; exit }
{ seen[$1] = 1; name[count] = $1 }
what == "names.h" { printf "  X(%s, %d) \\\n", $1, count }
what == "trampolines.S" && !($1 in written) { printf "        .globl  %s\n        entry   %s, %d\n", $1, $1, count }
{ count++ }
END {
  if (failed) exit 1
  if (what == "names.h") {
    print "\n#define NAME_COUNT " count
    exit
  }
  print "        .section .data.rel.ro,\"aw\",@progbits\n        .balign 8\n        .hidden cedana_gpu_exports\n        .globl  cedana_gpu_exports"
  print "cedana_gpu_exports:"
  for (i = 0; i < count; i++) print "        .quad   " name[i]
  print "        .text"
}
