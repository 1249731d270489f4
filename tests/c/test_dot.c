/* Inner products: the Gram matrix of several lists against long double, bits over instruction sets and splits. */
#include "check.h"
#include "lists.h"
#include "tests.h"

#include <stdlib.h>

static const double roundoff = 0x1p-53;

enum { GRAM_LISTS = FM_BIT(0) | FM_BIT(1) | FM_BIT(2) | FM_BIT(3), MOST_SUMS = FM_DOT_SUMS };

/* The upper triangle of the Gram matrix in long double, and what the roundings of `result` are bounded by: the sum of
 * the products' magnitudes. */
static void gram_of(const fm_list *list, int lists, long double *gram, long double *magnitudes) {
  int pair = 0;
  for (int a = 0; a < lists; a++) {
    for (int b = a; b < lists; b++, pair++) {
      gram[pair] = magnitudes[pair] = 0.0L;
      for (int64_t r = 0; r < list->count; r++) {
        for (int64_t i = 0; i < list->rows[r].numel; i++) {
          const long double x = (long double)get(&list->rows[r].operand[a], i) * get(&list->rows[r].operand[b], i);
          gram[pair] += x;
          magnitudes[pair] += fabsl(x);
        }
      }
    }
  }
}

/* dot of a list, by every table and split: the same bits, those of partial results included. */
static void dot_everywhere(const fm_list *list, const fm_options *o, double *result, const char *what) {
  const fm_kernels *tables[MOST_TABLES];
  const int table_count = kernel_tables(tables), count = fm_dot_sums(o->lists);
  const size_t partials = (size_t)list->first_chunk[list->count] * (size_t)fm_dot_planes(o->lists);
  uint64_t first = 0;
  for (int t = 0; t < table_count; t++) {
    fm_active_kernels = tables[t];
    for (int s = 0; s < SPLITS; s++) {
      double got[MOST_SUMS + 1];
      got[count] = -1.0;
      memset(list->partials, 0xa5, partials * sizeof *list->partials);
      run_split(tables[t]->dot, list, o, false, splits[s]);
      uint64_t hash = hash_bytes(list->partials, partials * sizeof *list->partials, 0);
      fm_dot(list, o, got, splits[s]);
      hash = hash_bytes(got, (size_t)count * sizeof *got, hash);
      first = t == 0 && s == 0 ? hash : first;
      CHECK(hash == first && got[count] == -1.0, "%s of %d: table %d split %d", what, o->lists, tables[t]->isa, s);
      memcpy(result, got, (size_t)count * sizeof *got);
    }
  }
}

/* Lists of every type and of mixed ones. A product of float32 is exact, of float64 one rounding; 16 + 8 + 5 additions.
 * The diagonal is the square of the norm, bit by bit: the same terms and the same tree. */
void test_dot(void) {
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int exact = 0; exact < 2; exact++) {
      fm_list list = make_list(type, GRAM_LISTS, exact ? GRAM_LISTS : FM_BIT(0));
      free(list.partials);
      list.partials = malloc((size_t)(3 * list.first_chunk[list.count]) * sizeof *list.partials);
      for (int lists = 2; lists <= FM_DOT_LISTS; lists++) {
        long double want[MOST_SUMS], magnitudes[MOST_SUMS];
        double got[MOST_SUMS] = {0.0};
        const fm_options o = {.q = 2.0, .lists = lists};
        gram_of(&list, lists, want, magnitudes);
        dot_everywhere(&list, &o, got, "dot");
        for (int pair = 0; pair < fm_dot_sums(lists); pair++) {
          CHECK(fabsl(got[pair] - want[pair]) <= 30 * roundoff * magnitudes[pair],
                "type %d, %d of %d: %.17g, not %.17Lg", (int)type, pair, lists, got[pair], want[pair]);
        }
        fm_list squared = copy_list(&list);
        for (int64_t r = 0; r < list.count; r++) {
          free(squared.rows[r].operand[FM_GRAD].data);
          squared.rows[r].operand[FM_GRAD] = squared.rows[r].operand[1];
          squared.rows[r].operand[1].data = NULL;
          squared.rows[r].traits.scaling = FM_SCALE_NONE;
        }
        const double norm = fm_norm(&squared, &o, splits[0]), diagonal = sqrt(got[lists]); /* (1, 1) */
        CHECK(fm_bits_f64(norm) == fm_bits_f64(diagonal), "type %d: norm %.17g, not %.17g", (int)type, norm, diagonal);
        free_list(&squared);
      }
      free_list(&list);
    }
  }
  const fm_options o = {.lists = 3};
  double none[MOST_SUMS] = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0};
  int64_t first_chunk[1] = {0};
  const fm_list empty = {NULL, 0, first_chunk, NULL};
  fm_dot(&empty, &o, none, splits[0]);
  for (int pair = 0; pair < 6; pair++) {
    CHECK(none[pair] == 0.0, "of nothing: %g", none[pair]);
  }
}

/* One element that is not finite spoils the sums of its list, in every lane, and no others. */
void test_dot_not_finite(void) {
  const int64_t size = 5000, places[] = {0, 1, 127, 128, 255, 256, 4095, 4096, 4999};
  const double wrong[] = {NAN, INFINITY, -INFINITY};
  for (fm_dtype type = FM_F32; type <= FM_F64; type++) {
    for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
      for (int bad = 0; bad < FM_DOT_LISTS; bad++) {
        fm_list list = make_list_of(&size, 1, type, GRAM_LISTS, GRAM_LISTS);
        free(list.partials);
        list.partials = malloc(6 * sizeof *list.partials);
        const fm_options o = {.lists = FM_DOT_LISTS};
        double got[MOST_SUMS];
        put(&list.rows[0].operand[bad], places[p], wrong[p % 3]);
        put(&list.rows[0].operand[(bad + 1) % FM_DOT_LISTS], places[p], 0.0);
        fm_dot(&list, &o, got, splits[0]);
        int pair = 0;
        for (int a = 0; a < FM_DOT_LISTS; a++) {
          for (int b = a; b < FM_DOT_LISTS; b++, pair++) {
            CHECK(isfinite(got[pair]) == (a != bad && b != bad), "%g in list %d at %lld: (%d, %d) is %g", wrong[p % 3],
                  bad, (long long)places[p], a, b, got[pair]);
          }
        }
        free_list(&list);
      }
    }
  }
}
