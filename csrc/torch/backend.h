/* What a device offers to the operator table. backend_cpu.c is the CPU, cuda/backend_cuda.c the GPU; each is linked
 * with the operators into a library of its own. */
#ifndef FM_BACKEND_H
#define FM_BACKEND_H

#include "fm_label_ops.h"
#include "torch_args.h"

/* What a backend is asked for: a reduction, or an update of the table in updates.h. */
typedef enum fm_operator { FM_OP_NORM, FM_OP_TIES, FM_OP_DOT, FM_OP_PACGEN, FM_OP_ROW_NORMS, FM_OP_UPDATE } fm_operator;

typedef struct fm_backend {
  /* Sparse keys too: a sparse tensor sends the call there, and the checks then name the argument. NULL ends the list.
   */
  const char *dispatch_keys[4];
  bool defines_operators; /* the library that owns the namespace: the CPU's, which is always loaded */
  int32_t (*device_type)(void);
  int64_t (*partials)(int64_t chunks); /* partial results that a reduction over so many chunks needs room for; dot
                                        * needs fm_dot_planes times as many */
  int (*isa)(void), (*best_isa)(void);
  /* Runs an operator whose arguments are checked. `scalars` and `result` lie on the device; an update writes to
   * `result` what it tallies, one number or (noise) three, and nothing if that is NULL. */
  bool (*run)(fm_args *args, fm_operator op, fm_update update, const fm_list *list, const fm_options *options,
              const fm_scalars *scalars, double *result);
  /* Label noise. The host reads neither labels nor an index on a device, so only the CPU refuses what is out of range;
   * elsewhere such a label stays as it is. */
  bool (*corrupt_labels)(fm_args *args, const fm_label_job *job);
  bool (*draw_samples)(fm_args *args, const fm_draw_job *job);
} fm_backend;

extern const fm_backend fm_this_backend;

/* The torch namespace of the operators. The emulator's build has another one, to stand beside the CPU's. */
#ifndef FM_NAMESPACE
#define FM_NAMESPACE "flatmin"
#endif

#endif
