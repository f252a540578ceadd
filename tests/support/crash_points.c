/* A library for LD_PRELOAD that ends the process, or makes a call fail, at the n-th operation that
   changes files below a folder: opening for writing, write, fsync, rename, unlink, mkdir, rmdir,
   truncate. Native code is caught as well as Python.

   Armed with crash_arm(), through ctypes. At a write, half of the bytes are written first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { KILL = 0, FAIL = 1, POWER = 2 };
enum { MAX_DIRTY = 4096, CRASHED = 99 };

static char folder[PATH_MAX];
static long at, count;
static int mode, is_armed;
static ino_t dirty[MAX_DIRTY]; /* files with bytes that were not synced */
static int num_dirty;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Ends the process at operation `n`, counted from 1; 0: never. */
void crash_arm(const char *path, long n, int how) {
    snprintf(folder, sizeof folder, "%s", path);
    at = n, mode = how, count = 0, num_dirty = 0, is_armed = 1;
}

long crash_count(void) { return count; }

static int below(const char *path) {
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int watched_fd(int fd) {
    char name[64], path[PATH_MAX];
    if (!is_armed) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int watched_at(int fd, const char *path) {
    if (!is_armed) return 0;
    if (path[0] == '/') return below(path);
    return fd != AT_FDCWD && watched_fd(fd);
}

static void set_dirty(int fd, int is_dirty) {
    struct stat status;
    if (fstat(fd, &status)) return;
    for (int i = 0; i < num_dirty; i++)
        if (dirty[i] == status.st_ino) {
            if (!is_dirty) dirty[i] = dirty[--num_dirty];
            return;
        }
    if (is_dirty && num_dirty < MAX_DIRTY) dirty[num_dirty++] = status.st_ino;
}

static int lose(const char *path, const struct stat *status, int kind, struct FTW *where) {
    (void)where;
    for (int i = 0; kind == FTW_F && i < num_dirty; i++)
        if (dirty[i] == status->st_ino && truncate(path, 0)) perror("truncate");
    return 0;
}

/* Counts an operation. Returns whether it must fail. */
static int is_due(void) {
    return __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) == at;
}

static int strike(void) {
    if (mode == FAIL) {
        errno = EIO;
        return 1;
    }
    is_armed = 0;
    if (mode == POWER) nftw(folder, lose, 16, FTW_PHYS);
    _exit(CRASHED);
}

#define AT_ONCE(is_watched) \
    if ((is_watched) && is_due() && strike()) return -1

static int open_with(int fd, const char *path, int flags, mode_t bits) {
    if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) AT_ONCE(watched_at(fd, path));
    return REAL(openat)(fd, path, flags, bits);
}

#define OPENED_WITH(last)          \
    va_list rest;                  \
    va_start(rest, last);          \
    mode_t bits = va_arg(rest, int); \
    va_end(rest)

int open(const char *path, int flags, ...) {
    OPENED_WITH(flags);
    return open_with(AT_FDCWD, path, flags, bits);
}
int open64(const char *path, int flags, ...) {
    OPENED_WITH(flags);
    return open_with(AT_FDCWD, path, flags, bits);
}
int openat(int fd, const char *path, int flags, ...) {
    OPENED_WITH(flags);
    return open_with(fd, path, flags, bits);
}
int openat64(int fd, const char *path, int flags, ...) {
    OPENED_WITH(flags);
    return open_with(fd, path, flags, bits);
}

ssize_t write(int fd, const void *bytes, size_t size) {
    int is_watched = watched_fd(fd);
    if (is_watched && is_due()) {
        if (REAL(write)(fd, bytes, size / 2) < 0) perror("write");
        set_dirty(fd, 1);
        if (strike()) return -1;
    }
    if (is_watched) set_dirty(fd, 1);
    return REAL(write)(fd, bytes, size);
}
ssize_t writev(int fd, const struct iovec *parts, int num_parts) {
    AT_ONCE(watched_fd(fd));
    if (watched_fd(fd)) set_dirty(fd, 1);
    return REAL(writev)(fd, parts, num_parts);
}
int fsync(int fd) {
    int is_watched = watched_fd(fd);
    AT_ONCE(is_watched);
    if (is_watched) set_dirty(fd, 0);
    return REAL(fsync)(fd);
}
int fdatasync(int fd) { return fsync(fd); }
int ftruncate(int fd, off_t size) {
    AT_ONCE(watched_fd(fd));
    return REAL(ftruncate)(fd, size);
}
int rename(const char *from, const char *to) {
    AT_ONCE(watched_at(AT_FDCWD, from));
    return REAL(rename)(from, to);
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    AT_ONCE(watched_at(from_fd, from));
    return REAL(renameat)(from_fd, from, to_fd, to);
}
int unlink(const char *path) {
    AT_ONCE(watched_at(AT_FDCWD, path));
    return REAL(unlink)(path);
}
int unlinkat(int fd, const char *path, int flags) {
    AT_ONCE(watched_at(fd, path));
    return REAL(unlinkat)(fd, path, flags);
}
int rmdir(const char *path) {
    AT_ONCE(watched_at(AT_FDCWD, path));
    return REAL(rmdir)(path);
}
int mkdir(const char *path, mode_t bits) {
    AT_ONCE(watched_at(AT_FDCWD, path));
    return REAL(mkdir)(path, bits);
}
