// Preloaded into a process, fails or kills it at the n-th call that changes files below a folder.
// A write that is killed leaves half of its bytes, as a real crash may.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum Kind { kOpen = 1, kWrite = 2, kSync = 4, kRename = 8, kMkdir = 16, kUnlink = 32, kTruncate = 64 };

static char folder[4096];
static int armed, kinds;
static long seen, target;
static int error_number;  // 0: SIGKILL

// Counts calls of `kinds_` (a sum of Kind) below `folder_`; the `target_`-th fails, -1: none.
void faults_arm(const char* folder_, int kinds_, long target_, int error_) {
  snprintf(folder, sizeof folder, "%s", folder_);
  kinds = kinds_;
  target = target_;
  error_number = error_;
  seen = 0;
  armed = 1;
}

long faults_disarm(void) {
  armed = 0;
  return seen;
}

static int below(int directory, const char* path) {
  char full[8192], link[64];
  if (path && path[0] == '/') return strncmp(path, folder, strlen(folder)) == 0;
  if (directory == AT_FDCWD) return 0;  // the tests pass absolute paths
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, full, sizeof full - 1);
  if (length < 0) return 0;
  full[length] = 0;
  return strncmp(full, folder, strlen(folder)) == 0;
}

// 1: this call is to fail
static int hit(int kind, int directory, const char* path) {
  if (!armed || !(kinds & kind) || !below(directory, path)) return 0;
  return seen++ == target;
}

static int fail(void) {
  if (!error_number) kill(getpid(), SIGKILL);
  errno = error_number;
  return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags, last)                                       \
  mode_t mode = 0;                                              \
  if ((flags) & O_CREAT) {                                      \
    va_list list;                                               \
    va_start(list, last);                                       \
    mode = va_arg(list, mode_t);                                \
    va_end(list);                                               \
  }
#define CHANGES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR))

int open(const char* path, int flags, ...) {
  MODE(flags, flags)
  if (CHANGES(flags) && hit(kOpen, AT_FDCWD, path)) return fail();
  return REAL(open)(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE(flags, flags)
  if (CHANGES(flags) && hit(kOpen, AT_FDCWD, path)) return fail();
  return REAL(open64)(path, flags, mode);
}
int openat(int directory, const char* path, int flags, ...) {
  MODE(flags, flags)
  if (CHANGES(flags) && hit(kOpen, directory, path)) return fail();
  return REAL(openat)(directory, path, flags, mode);
}
int openat64(int directory, const char* path, int flags, ...) {
  MODE(flags, flags)
  if (CHANGES(flags) && hit(kOpen, directory, path)) return fail();
  return REAL(openat64)(directory, path, flags, mode);
}
ssize_t write(int file, const void* data, size_t size) {
  if (hit(kWrite, file, NULL)) {
    if (!error_number && size > 1) REAL(write)(file, data, size / 2);
    return fail();
  }
  return REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec* parts, int count) {
  if (hit(kWrite, file, NULL)) return fail();
  return REAL(writev)(file, parts, count);
}
ssize_t pwrite(int file, const void* data, size_t size, off_t at) {
  if (hit(kWrite, file, NULL)) return fail();
  return REAL(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void* data, size_t size, off64_t at) {
  if (hit(kWrite, file, NULL)) return fail();
  return REAL(pwrite64)(file, data, size, at);
}
int fsync(int file) { return hit(kSync, file, NULL) ? fail() : REAL(fsync)(file); }
int fdatasync(int file) { return hit(kSync, file, NULL) ? fail() : REAL(fdatasync)(file); }
int rename(const char* from, const char* to) {
  return hit(kRename, AT_FDCWD, from) ? fail() : REAL(rename)(from, to);
}
int renameat(int a, const char* from, int b, const char* to) {
  return hit(kRename, a, from) ? fail() : REAL(renameat)(a, from, b, to);
}
int mkdir(const char* path, mode_t mode) {
  return hit(kMkdir, AT_FDCWD, path) ? fail() : REAL(mkdir)(path, mode);
}
int mkdirat(int directory, const char* path, mode_t mode) {
  return hit(kMkdir, directory, path) ? fail() : REAL(mkdirat)(directory, path, mode);
}
int unlink(const char* path) {
  return hit(kUnlink, AT_FDCWD, path) ? fail() : REAL(unlink)(path);
}
int unlinkat(int directory, const char* path, int flags) {
  return hit(kUnlink, directory, path) ? fail() : REAL(unlinkat)(directory, path, flags);
}
int rmdir(const char* path) { return hit(kUnlink, AT_FDCWD, path) ? fail() : REAL(rmdir)(path); }
int ftruncate(int file, off_t size) {
  return hit(kTruncate, file, NULL) ? fail() : REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
  return hit(kTruncate, file, NULL) ? fail() : REAL(ftruncate64)(file, size);
}
