/* Writes that fail on purpose: LD_PRELOAD this, then call faults_arm(). Used by survive.py.

   From the n-th write-like call under `prefix` on (or the n-th alone) calls fail with `error`. Reads never do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[4096];
static long at, only_once, failure, count;

void faults_arm(const char *under, long n, long error, long once) {
    strncpy(prefix, under, sizeof prefix - 1);
    at = n, failure = error, only_once = once, count = 0;
}
long faults_count(void) { return count; }

static int fails(const char *path) {
    if (!prefix[0] || !path || strncmp(path, prefix, strlen(prefix))) return 0;
    long now = __sync_add_and_fetch(&count, 1);
    if (!at || now < at || (only_once && now > at)) return 0;
    errno = (int)failure;
    return 1;
}
static int fails_fd(int fd) {
    if (!prefix[0]) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path);
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t n) { REAL(write); return fails_fd(fd) ? -1 : real(fd, data, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); return fails_fd(fd) ? -1 : real(fd, v, n); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t o) {
    REAL(pwrite64);
    return fails_fd(fd) ? -1 : real(fd, data, n, o);
}
int fsync(int fd) { REAL(fsync); return fails_fd(fd) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); return fails_fd(fd) ? -1 : real(fd, n); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(path) ? -1 : real(path, mode); }
int rename(const char *from, const char *to) { REAL(rename); return fails(to) ? -1 : real(from, to); }
static int creates(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR); }
int open(const char *path, int flags, ...) {
    REAL(open);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    return creates(flags) && fails(path) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    return creates(flags) && fails(path) ? -1 : real(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    REAL(openat);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    return creates(flags) && fails(path) ? -1 : real(folder, path, flags, mode);
}
