/* A digest of every operator's bytes on fixed inputs, a line each, the same from every table. They are printed, or held
 * against the lines of a file, which another compiler or processor printed: no number in them comes from libm. */
#include "check.h"
#include "lists.h"
#include "tests.h"

static const char *const type_names[] = {"float32", "float64", "bfloat16", "float16"};

/* Digests of a list and of what is returned beside it. */
static uint64_t hash_numbers(const double *numbers, size_t count, uint64_t hash) {
  return hash_bytes(numbers, count * sizeof *numbers, hash);
}

static uint64_t digest_update(const update_case *c, const fm_list *start) {
  fm_list list = copy_list(start);
  const fm_sum sum = fm_run_update(c->update, &list, &c->options, NULL, splits[0]);
  const uint64_t hash = hash_numbers((double[]){sum.mid, sum.big, sum.small, sum.rest}, 4, hash_list(&list));
  free_list(&list);
  return hash;
}

/* Norms by every exponent, their ties, norms of rows, PACGen's sums. */
static uint64_t digest_reductions(const fm_list *list) {
  const double exponents[] = {1.0, 1.5, 2.0, 3.0, 51.0, INFINITY};
  uint64_t hash = 0;
  fm_options o = some_options();
  for (int e = 0; e < 6; e++) {
    o.q = exponents[e];
    o.norm = fm_norm(list, &o, splits[0]);
    hash = hash_numbers(&o.norm, 1, hash);
  }
  const double ties = fm_ties(list, &o, splits[0]);
  double rows[64];
  fm_row_norms(list, &o, rows, splits[0]);
  hash = hash_numbers(rows, (size_t)list->count, hash_numbers(&ties, 1, hash));
  fm_pacgen(list, &o, rows, splits[0]);
  return hash_numbers(rows, 2 * (size_t)list->count, hash);
}

/* What has been printed elsewhere, or NULL. */
static FILE *expected;

static void compare(const char *line) {
  char other[128] = "";
  if (expected == NULL) {
    fputs(line, stdout);
  } else if (fgets(other, sizeof other, expected) == NULL || strcmp(line, other) != 0) {
    CHECK(false, "%.*s, but %.*s was expected", (int)strcspn(line, "\n"), line, (int)strcspn(other, "\n"), other);
  }
}

static void report(const char *name, int number, fm_dtype type, const update_case *c, const fm_list *list) {
  const fm_kernels *tables[MOST_TABLES];
  const int count = kernel_tables(tables);
  uint64_t first = 0;
  for (int t = 0; t < count; t++) {
    fm_active_kernels = tables[t];
    const uint64_t hash = c != NULL ? digest_update(c, list) : digest_reductions(list);
    first = t == 0 ? hash : first;
    CHECK(hash == first, "%s %d %s: table %d differs", name, number, type_names[type], tables[t]->isa);
  }
  char line[128];
  snprintf(line, sizeof line, "%016llx %s %d %s\n", (unsigned long long)first, type_names[type], number, name);
  compare(line);
}

void test_digests(void) {
  expected = test_argument != NULL ? fopen(test_argument, "r") : NULL;
  if (test_argument != NULL && expected == NULL) {
    CHECK(false, "%s cannot be read", test_argument);
    return;
  }
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int k = 0; k < count; k++) {
      fm_list list = make_list(type, cases[k].operands, EXACT);
      report(cases[k].name, k, type, &cases[k], &list);
      free_list(&list);
    }
    fm_list list = make_list(type, FM_BIT(FM_GRAD) | FM_BIT(FM_PARAM) | FM_AVERAGES, FM_BIT(FM_GRAD));
    report("reductions", count, type, NULL, &list);
    free_list(&list);
  }
  if (expected != NULL) {
    CHECK(fgetc(expected) == EOF, "%s has more lines", test_argument);
    fclose(expected);
  }
}
