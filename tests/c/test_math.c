/* float16.h and pow.h against libm and against the definitions of the formats. */
#include "check.h"
#include "tests.h"

/* ---- all 2^16 values of both 16-bit types ---- */

/* A float16 by definition: (-1)^s (h + m / 1024) 2^(e - 15). */
static double f16_value(uint32_t h) {
  const int exponent = (int)(h >> 10) & 31, mantissa = (int)h & 1023;
  const double magnitude = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000u ? -magnitude : magnitude;
}

/* A bfloat16 by definition: (-1)^s (h + m / 128) 2^(e - 127). */
static double bf16_value(uint32_t h) {
  const int exponent = (int)(h >> 7) & 255, mantissa = (int)h & 127;
  const double magnitude = exponent == 0 ? ldexp(mantissa, -133) : ldexp(128 + mantissa, exponent - 134);
  return h & 0x8000u ? -magnitude : magnitude;
}

typedef struct format {
  const char *name;
  uint32_t infinity, quiet;
  double (*value)(uint32_t);
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
} format;

static const format formats[] = {
    {"float16", 0x7c00u, 0x7e00u, f16_value, fm_f16_to_f32, fm_f32_to_f16},
    {"bfloat16", 0x7f80u, 0x7fc0u, bf16_value, fm_bf16_to_f32, fm_f32_to_bf16},
};

/* Between h and its upper neighbour: the middle goes to the even one, a hair off it to the nearer one. */
static void check_neighbours(const format *f, uint32_t h) {
  const double low = f->value(h), high = h + 1 == f->infinity ? 2 * low - f->value(h - 1) : f->value(h + 1);
  const float middle = (float)((low + high) / 2);
  const uint32_t even = h % 2 == 0 ? h : h + 1;
  CHECK(f->narrow(middle) == even, "%s: middle above %04x gave %04x", f->name, h, f->narrow(middle));
  CHECK(f->narrow(nextafterf(middle, 0.0F)) == h, "%s: below the middle above %04x", f->name, h);
  CHECK(f->narrow(nextafterf(middle, INFINITY)) == h + 1, "%s: above the middle above %04x", f->name, h);
  CHECK(f->narrow(-middle) == (even | 0x8000u), "%s: negative middle above %04x", f->name, h);
}

void test_conversions(void) {
  for (int k = 0; k < 2; k++) {
    const format *f = &formats[k];
    for (uint32_t h = 0; h < 0x10000u; h++) {
      const float wide = f->widen((uint16_t)h);
      const uint32_t magnitude = h & 0x7fffu, sign = h & 0x8000u;
      if (magnitude > f->infinity) {
        CHECK(wide != wide, "%s: %04x is a NaN", f->name, h);
        const uint32_t narrow = f->narrow(wide);
        CHECK((narrow & 0x7fffu) == f->quiet, "%s: NaN %04x gave %04x", f->name, h, narrow);
      } else if (magnitude == f->infinity) {
        CHECK(wide == (sign ? -INFINITY : INFINITY) && f->narrow(wide) == h, "%s: infinity %04x", f->name, h);
      } else {
        CHECK((double)wide == f->value(h) && !signbit(wide) == !sign, "%s: %04x gave %a", f->name, h, (double)wide);
        CHECK(f->narrow(wide) == h, "%s: %04x came back as %04x", f->name, h, f->narrow(wide));
      }
      if (h < f->infinity) {
        check_neighbours(f, h);
      }
    }
    CHECK(f->narrow(3.4e38F) == f->infinity, "%s: overflow", f->name);
    CHECK(f->narrow(1e-45F) == 0, "%s: underflow", f->name);
  }
}

/* Every x rounds to a neighbour, exact values stay, and the two extreme words give the two neighbours. */
void test_rounding(void) {
  for (int k = 0; k < 2; k++) {
    const format *f = &formats[k];
    uint16_t (*const narrow)(float, uint32_t) = k == 0 ? fm_f32_to_f16_random : fm_f32_to_bf16_random;
    for (uint32_t h = 0; h + 1 < f->infinity; h++) {
      const float low = f->widen((uint16_t)h), high = f->widen((uint16_t)(h + 1));
      const float quarter = (float)((double)low + 0.25 * ((double)high - (double)low));
      CHECK(narrow(low, 0) == h && narrow(low, UINT32_MAX) == h, "%s: exact %04x moved", f->name, h);
      if (quarter > low) { /* the smallest subnormals of bfloat16 have no quarter in float */
        CHECK(narrow(quarter, 0) == h && narrow(quarter, UINT32_MAX) == h + 1, "%s: quarter above %04x", f->name, h);
        CHECK(narrow(quarter, 0xbfffffffu) == h && narrow(quarter, 0xc0000000u) == h + 1, "%s: odds above %04x",
              f->name, h);
        CHECK(narrow(-quarter, UINT32_MAX) == ((h + 1) | 0x8000u), "%s: negative quarter above %04x", f->name, h);
      }
    }
    CHECK(narrow(INFINITY, UINT32_MAX) == f->infinity, "%s: infinity", f->name);
    CHECK((narrow(NAN, UINT32_MAX) & 0x7fffu) == f->quiet, "%s: NaN", f->name);
  }
}

void test_pow(void) {
  const double exponents[] = {0.019607843137254902, 0.1, 0.5, 0.6666666666666666, 1.5, 2.0, 3.0, 51.0, 1001.0};
  for (size_t k = 0; k < sizeof exponents / sizeof *exponents; k++) {
    for (int n = 0; n < 8390; n++) { /* 5e-324 to 1e307: a quarter of a power of two at a time */
      const double x = ldexp(1.0 + n % 4 * 0.23, n / 4 - 1074);
      const double expected = pow(x, exponents[k]), got = fm_pow(x, exponents[k]);
      if (expected > 1e-300 && expected < 1e300) {
        CHECK(fabs(got - expected) <= 1e-12 * expected, "%a ^ %g = %a, not %a", x, exponents[k], got, expected);
      }
    }
    CHECK(fm_pow(0.0, exponents[k]) == 0.0 && fm_pow(1.0, exponents[k]) == 1.0, "0 and 1 to the %g", exponents[k]);
  }
  for (int64_t n = 0; n < 5000; n++) {
    CHECK(fabs(fm_pow_int(0.999, n) - pow(0.999, (double)n)) <= 1e-14, "0.999^%lld", (long long)n);
  }
}
