/* Clocks that a test moves: added to what the system says are the two numbers (seconds, as double) in the file that
 * DURABILITY_CLOCK names, the first to the time of day, the second to the monotonic clock. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile double *offsets;

__attribute__((constructor)) static void open_offsets(void) {
  const char *path = getenv("DURABILITY_CLOCK");
  int file = path ? open(path, O_RDONLY) : -1;
  void *found = file < 0 ? MAP_FAILED : mmap(NULL, 2 * sizeof(double), PROT_READ, MAP_SHARED, file, 0);
  offsets = found == MAP_FAILED ? NULL : found;
}

static void move(struct timespec *at, double by) {
  double whole = floor(by);
  at->tv_sec += (time_t)whole;
  at->tv_nsec += (long)((by - whole) * 1e9);
  if (at->tv_nsec >= 1000000000L) {
    at->tv_nsec -= 1000000000L;
    at->tv_sec += 1;
  }
}

int clock_gettime(clockid_t clock, struct timespec *at) {
  static int (*system)(clockid_t, struct timespec *);
  if (!system) system = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int result = system(clock, at);
  if (!result && offsets) {
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) move(at, offsets[0]);
    if (clock == CLOCK_MONOTONIC || clock == CLOCK_MONOTONIC_RAW || clock == CLOCK_MONOTONIC_COARSE || clock == CLOCK_BOOTTIME)
      move(at, offsets[1]);
  }
  return result;
}

time_t time(time_t *out) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  if (out) *out = at.tv_sec;
  return at.tv_sec;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
