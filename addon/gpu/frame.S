/*
 * What every exported name does: note which it is, and go through the one frame.
 *
 * The frame knows no prototypes. It keeps the six integer and the first two floating-point arguments (the interface has no function
 * with more), asks cedana_gpu_enter what to call, calls it with the same registers and a copy of the caller's stack
 * arguments, and hands the result to cedana_gpu_leave. STACK_WORDS is more than any function has (cuTensorMapEncodeIm2colWide:
 * 10); what is read beyond a shorter list is the caller's own frame.
 *
 * A full frame, rather than a changed return address: unwinders, exceptions out of callbacks and shadow stacks find nothing odd.
 */
#define STACK_WORDS 16
#define CALL_BYTES 144 /* as in gpu.h; a multiple of 16 */
#define INDEX 72
#define RESULT 80

        .section .note.GNU-stack,"",@progbits
        .text

        .hidden cedana_gpu_enter
        .hidden cedana_gpu_leave
        .type   cedana_gpu_frame, @function
        .balign 64
cedana_gpu_frame:
        .cfi_startproc
        pushq   %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        movq    %rsp, %rbp
        .cfi_def_cfa_register %rbp
        pushq   %rbx
        .cfi_offset %rbx, -24
        subq    $(CALL_BYTES + 8), %rsp
        movq    %rdi, 0(%rsp)
        movq    %rsi, 8(%rsp)
        movq    %rdx, 16(%rsp)
        movq    %rcx, 24(%rsp)
        movq    %r8, 32(%rsp)
        movq    %r9, 40(%rsp)
        movq    %xmm0, 48(%rsp)
        movq    %xmm1, 56(%rsp)
        leaq    16(%rbp), %rcx
        movq    %rcx, 64(%rsp)
        movl    %eax, INDEX(%rsp)
        movq    %rsp, %rbx
        movq    %rsp, %rdi
        call    cedana_gpu_enter
        testq   %rax, %rax
        jz      1f
        movq    %rax, %r11
        subq    $(STACK_WORDS * 8), %rsp
        .set    at, 0
        .rept   STACK_WORDS / 2
        movups  16+at(%rbp), %xmm2
        movups  %xmm2, at(%rsp)
        .set    at, at + 16
        .endr
        movq    0(%rbx), %rdi
        movq    8(%rbx), %rsi
        movq    16(%rbx), %rdx
        movq    24(%rbx), %rcx
        movq    32(%rbx), %r8
        movq    40(%rbx), %r9
        movq    48(%rbx), %xmm0
        movq    56(%rbx), %xmm1
        call    *%r11
        movq    %rax, RESULT(%rbx)
        movq    %rbx, %rdi
        call    cedana_gpu_leave
1:      movq    RESULT(%rbx), %rax
        movq    -8(%rbp), %rbx
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
        .size   cedana_gpu_frame, . - cedana_gpu_frame

        /* 16 bytes each: driver.c computes the addresses of the spare ones. */
        .macro  entry name, index
        .type   \name, @function
        .balign 16
\name:
        .cfi_startproc
        endbr64
        movl    $\index, %eax
        jmp     cedana_gpu_frame
        .cfi_endproc
        .size   \name, . - \name
        .endm

#include "trampolines.S"

        .hidden cedana_gpu_spares
        .globl  cedana_gpu_spares
        .balign 16
cedana_gpu_spares:
        .set    at, NAME_COUNT
        .rept   SPARE_COUNT
        .cfi_startproc
        .balign 16
        endbr64
        movl    $at, %eax
        jmp     cedana_gpu_frame
        .cfi_endproc
        .set    at, at + 1
        .endr
        .balign 16
