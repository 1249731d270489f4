/* fm_random.h: words against the generator's published answers, functions against libm in double. Each bound is the
 * largest error over all arguments (all 2^32 words, all floats of the range), rounded up in the third digit; the tests
 * sample. */
#include "check.h"
#include "lists.h"
#include "tests.h"

/* The known answers published with Random123 (kat_vectors, philox4x32 10). */
void test_philox(void) {
  const fm_quad counters[] = {{{0, 0, 0, 0}},
                              {{UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX}},
                              {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}};
  const uint32_t keys[][2] = {{0, 0}, {UINT32_MAX, UINT32_MAX}, {0xa4093822u, 0x299f31d0u}};
  const fm_quad answers[] = {{{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
                             {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
                             {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}};
  for (int k = 0; k < 3; k++) {
    const fm_quad got = fm_philox(counters[k], keys[k][0], keys[k][1]);
    CHECK(memcmp(&got, &answers[k], sizeof got) == 0, "vector %d: %08x ...", k, got.word[0]);
  }
  /* the third counter in our terms: quad 0x08d3243f6a88 of tensor 0x13198a2e, draw 0x03707344, stream 0x85a3 */
  const fm_quad got = fm_random_quad(0x299f31d0a4093822u, 0x85a3ull << 32 | 0x03707344u, 0x13198a2eu, 0x08d3243f6a88u);
  CHECK(memcmp(&got, &answers[2], sizeof got) == 0, "seed, step, tensor and quad make another counter");
}

/* ---- draws of whole blocks ---- */

enum { WORDS_ROWS = 5, LOG_CHUNKS = 38 };

/* All laws of one chunk, from every table, against the draws of its quads one by one. */
static void check_words(const fm_list *list, fm_options *o, int64_t row, int64_t chunk) {
  const fm_kernels *tables[MOST_TABLES];
  const int table_count = kernel_tables(tables);
  const fm_view *v = &list->rows[row].operand[FM_PARAM];
  const int64_t at = list->first_chunk[row] + chunk;
  for (int t = 0; t < table_count; t++) {
    for (o->law = FM_LAW_UNIFORM; o->law <= FM_LAW_RADEMACHER; o->law++) {
      const fm_job job = {list, o, NULL, false};
      tables[t]->update[FM_PROBE](&job, at, at + 1);
      bool same = true;
      for (int64_t i = 0; i < FM_CHUNK; i += 4) {
        const uint64_t quad = (uint64_t)(chunk * FM_CHUNK + i) / 4;
        const fm_draws want = fm_draw_quad(fm_random_quad(o->seed, o->step, (uint32_t)row, quad), o->law);
        for (int l = 0; l < 4; l++) {
          same = same && get(v, i + l) == (double)want.value[l];
        }
      }
      CHECK(same, "table %d, law %d: row %lld, chunk %lld, step %llx", tables[t]->isa, o->law, (long long)row,
            (long long)chunk, (unsigned long long)o->step);
    }
  }
}

/* random_block of each instruction set, through FM_PROBE. The chunks of a tensor of 2^50 elements lie upon one another,
 * so that one of memory serves; its quads pass 2^32. The three laws show all bits of a word: 23 the uniform, and the
 * normal law the rest, in the angle where a word is near a quarter. */
void test_words(void) {
  static const fm_layout upon = {2, {1ll << LOG_CHUNKS, FM_CHUNK}, {0, 1}};
  const int64_t chunks[] = {0, 1, (1ll << 22) - 1, 1ll << 22, (1ll << 22) + 1, (1ll << LOG_CHUNKS) - 1};
  const uint64_t keys[][2] = {{0, 0}, {0x299f31d0a4093822u, 6}, {UINT64_MAX, 0xffffffffffffu}, {1, 0xfffeull << 32}};
  for (int type = FM_F32; type <= FM_F64; type++) {
    double memory[FM_CHUNK];
    fm_row rows[WORDS_ROWS];
    int64_t first_chunk[WORDS_ROWS + 1];
    for (int r = 0; r < WORDS_ROWS; r++) {
      rows[r] = (fm_row){.operand = {{(char *)memory, &upon, (fm_dtype)type}}, .fp64 = type == FM_F64};
      rows[r].numel = (int64_t)FM_CHUNK << LOG_CHUNKS;
    }
    fm_list list = {rows, WORDS_ROWS, first_chunk, NULL};
    fm_list_plan(&list);
    fm_options o = some_options();
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
      o.seed = keys[c % 4][0];
      o.step = keys[c % 4][1];
      check_words(&list, &o, (int64_t)c % WORDS_ROWS, chunks[c]);
    }
  }
}

/* ---- laws ---- */

/* The largest distance between the distribution of n numbers in (-1, 1) and the uniform one, at 1024 places. */
static double distance_to_uniform(const int64_t *counts, int64_t n) {
  double worst = 0.0;
  int64_t below = 0;
  for (int64_t b = 0; b < 1024; b++) {
    below += counts[b];
    worst = fmax(worst, fabs((double)below / (double)n - (double)(b + 1) / 1024.0));
  }
  return worst;
}

/* What has a continuous law is uniform after its distribution function (1.95 / sqrt n is passed by chance once in a
 * thousand times: Kolmogorov), and lanes do not correlate (4 standard deviations). */
static void check_law(int law, double (*mass)(double)) {
  enum { QUADS = 1 << 17, COUNT = 4 * QUADS };
  int64_t counts[1024] = {0};
  double products[3] = {0.0};
  for (uint64_t q = 0; q < QUADS; q++) {
    const fm_draws x = fm_draw_quad(fm_random_quad(7, 8, 9, q), law);
    for (int l = 0; l < 4; l++) {
      const double place = 512.0 * (mass((double)x.value[l]) + 1.0);
      counts[place < 1024.0 ? (int)place : 1023]++;
    }
    for (int l = 0; l < 3; l++) {
      products[l] += (double)x.value[l] * (double)x.value[l + 1];
    }
  }
  const double distance = distance_to_uniform(counts, COUNT);
  CHECK(distance < 1.95 / sqrt((double)COUNT), "law %d: distance %g", law, distance);
  for (int l = 0; l < 3; l++) {
    CHECK(fabs(products[l]) < 4.0 * sqrt((double)QUADS), "law %d: lanes %d and %d: %g", law, l, l + 1, products[l]);
  }
}

static double itself(double x) { return x; }

static double normal_mass(double x) { return erf(x * 0.7071067811865476); }

/* The uniform law takes the centres of 2^23 cells, so never 0, -1 or 1, and as many above 0 as below. */
void test_laws(void) {
  for (uint32_t cell = 0; cell < 1u << 23; cell++) {
    const uint32_t word = cell << 9 | cell % 512;
    const double x = (double)fm_uniform(word);
    CHECK(x == ((double)cell + 0.5) / 0x1p22 - 1.0, "word %08x: %.9g", word, x);
    CHECK((double)fm_uniform(~word) == -x, "word %08x: not symmetric", word);
  }
  for (uint64_t i = 0; i < 1000; i++) {
    const fm_quad words = fm_random_quad(1, 2, 3, i);
    const float x = fm_rademacher(words.word[0]);
    CHECK(x == (words.word[0] < 1u << 31 ? 1.0F : -1.0F), "word %08x: %g", words.word[0], (double)x);
  }
  check_law(FM_LAW_UNIFORM, itself);
  check_law(FM_LAW_NORMAL, normal_mass);
}

/* ---- elementary functions ---- */

static void check_ln(uint32_t bits) {
  const double x = (double)fm_f32_bits(bits), want = log(x), got = (double)fm_ln(fm_f32_bits(bits));
  CHECK(fabs(got - want) <= 8.28e-8 * fabs(want), "ln %.9g = %.9g, not %.9g", x, got, want);
}

/* Over all normal floats; next to 1, where the logarithm vanishes, each of them. */
void test_ln(void) {
  const uint32_t one = 0x3f800000u;
  for (uint32_t bits = 0x00800000u; bits < 0x7f800000u; bits += 4099) {
    check_ln(bits);
  }
  for (uint32_t bits = one - 40000; bits < one + 40000; bits++) {
    check_ln(bits);
  }
  check_ln(0x00800000u);
  check_ln(0x7f7fffffu);
}

static void check_exp2f(float t) {
  const double want = exp2((double)t), got = (double)fm_exp2f(t);
  CHECK(fabs(got - want) <= 8.79e-8 * want, "2^%.9g = %.9g, not %.9g", (double)t, got, want);
}

void test_exp2f(void) {
  const uint32_t end = 0x42fc0000u; /* 126 */
  for (uint32_t bits = 0x30000000u; bits < end; bits += 2039) {
    check_exp2f(fm_f32_bits(bits));
    check_exp2f(-fm_f32_bits(bits));
  }
  for (int n = -252; n <= 252; n++) { /* where the polynomial changes, and whole powers */
    check_exp2f(0.5F * (float)n);
    CHECK(n % 2 != 0 || fm_exp2f(0.5F * (float)n) == ldexpf(1.0F, n / 2), "2^%d", n / 2);
  }
}

/* Adding one rounding for a product: a unit vector stays one to 2.04e-7. */
static void check_turn(uint32_t word) {
  const double angle = 2.0 * 3.141592653589793 * (double)word * 0x1p-32;
  float c = 0.0F, s = 0.0F;
  fm_turn(word, &c, &s);
  CHECK(fabs((double)c - cos(angle)) <= 1.23e-7, "word %08x: cosine %.9g", word, (double)c);
  CHECK(fabs((double)s - sin(angle)) <= 1.23e-7, "word %08x: sine %.9g", word, (double)s);
  CHECK(fabs((double)c * (double)c + (double)s * (double)s - 1.0) <= 2.04e-7, "word %08x: length", word);
}

void test_turn(void) {
  for (uint64_t word = 0; word < 1ull << 32; word += 8191) {
    check_turn((uint32_t)word);
  }
  for (uint32_t eighth = 0; eighth < 8; eighth++) { /* quarters, and the places between them where the branch changes */
    for (uint32_t off = 0; off < 600; off++) {
      check_turn((eighth << 29) + off - 300);
    }
  }
  const float axes[][2] = {{1, 0}, {0, 1}, {-1, 0}, {0, -1}};
  for (uint32_t quarter = 0; quarter < 4; quarter++) {
    float c = 0.0F, s = 0.0F;
    fm_turn(quarter << 30, &c, &s);
    CHECK(c == axes[quarter][0] && s == axes[quarter][1], "quarter %u: %g, %g", quarter, (double)c, (double)s);
  }
}

/* ---- the normal law and its inverse ---- */

/* Between 1 and 6 the relative error of 1 - mass is that of fm_exp2f and of an argument up to 30 in magnitude, the
 * absolute one at most 3.01e-7; at 6 the mass is 1 - 2e-9. */
void test_normal_mass(void) {
  for (uint32_t bits = 0x3f800000u; bits < 0x41100000u; bits += 61) { /* 1 to 9 */
    const float a = fm_f32_bits(bits), got = fm_normal_mass(a);
    CHECK(fabs((double)got - normal_mass((double)a)) <= 3.01e-7, "mass within %.9g: %.9g", (double)a, (double)got);
    CHECK(got <= 1.0F && (a < 6.0F || got == 1.0F), "mass within %.9g: %.9g", (double)a, (double)got);
  }
  CHECK(fm_normal_mass(INFINITY) == 1.0F, "all of it");
}

double normal_quantile(double mass) {
  const double magnitude = fabs(mass);
  double x = 0.0;
  for (int k = 0; k < 100; k++) { /* from 0, where the density is largest, Newton's method never passes the root */
    const double rest = magnitude < 0.5 ? magnitude - normal_mass(x) : erfc(x * 0.7071067811865476) - (1.0 - magnitude);
    const double step = rest / (0.7978845608028654 * exp(-0.5 * x * x));
    x += step;
    if (fabs(step) <= 1e-15 * x) {
      break;
    }
  }
  return mass < 0.0 ? -x : x;
}

static void check_quantile(float y) {
  const double want = normal_quantile((double)y), got = (double)fm_normal_quantile(y);
  CHECK(fabs(got - want) <= 3.43e-7 * want, "quantile of %.9g: %.9g, not %.9g", (double)y, got, want);
  CHECK(fm_normal_quantile(-y) == -fm_normal_quantile(y), "quantile of %.9g: not symmetric", (double)y);
}

void test_normal_quantile(void) {
  const uint32_t end = fm_bits_f32(1.0F - 0x1p-23F);
  for (uint32_t bits = 0x2f000000u; bits < end; bits += 2477) { /* from 1e-10 on */
    check_quantile(fm_f32_bits(bits));
  }
  for (uint32_t bits = end - 2000; bits <= end; bits++) {
    check_quantile(fm_f32_bits(bits));
  }
  CHECK(fm_normal_quantile(0.0F) == 0.0F, "the middle");
}

/* The mass below a draw is the uniform number times the mass within the cut, to the error of that (3.01e-7), of the
 * product (6e-8) and of the quantile (3.43e-7 of x; twice the density is at most 0.484 / x). */
void test_truncation(void) {
  const double cuts[] = {1.0, 1.0 + 0x1p-23, 1.5, 2.0, 3.0, 5.0, 7.0, 8.0, 20.0, INFINITY};
  const double bound = 3.01e-7 + 6e-8 + 3.43e-7 * 0.484;
  for (int k = 0; k < 10; k++) {
    const double cut = cuts[k];
    for (uint32_t cell = 0; cell < 1u << 23; cell += 389) {
      const float u = fm_uniform(cell << 9);
      const double x = (double)fm_truncate_f32(u, (float)cut), wide = fm_truncate_f64((double)u, cut);
      CHECK(fabs(x) <= cut && fabs(wide) <= cut, "%.9g is beyond %g", x, cut);
      CHECK(fabs(normal_mass(x) - (double)u * normal_mass(cut)) <= bound, "%.9g at %.9g within %g", x, (double)u, cut);
      CHECK((double)(float)wide == wide && fm_bits_f64(-wide) == fm_bits_f64(fm_truncate_f64((double)-u, cut)),
            "%.17g at %.9g within %g", wide, (double)u, cut);
    }
  }
}
