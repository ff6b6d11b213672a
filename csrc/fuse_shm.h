/* Frames between processes: a ring of pictures in POSIX shared memory. Plain C99 (and C++), no
 * library but C's (-lrt before glibc 2.34); one producer, any number of readers, no locks.
 *
 *     fuse_shm ring;                                           // a producer
 *     if (fuse_shm_create(&ring, "thermal", 640, 512, FUSE_SHM_GRAY16, 0, 4)) perror("thermal");
 *     for (;;) {
 *         grab_into(fuse_shm_begin(&ring));                    // fuse_shm_frame_bytes() bytes
 *         fuse_shm_publish(&ring, fuse_shm_now());             // the frame's capture time
 *     }
 *     fuse_shm_close(&ring);                                   // readers see the end of the stream
 *
 * and `fuseengine video --infrared shm://thermal ...` reads it. Without this header, the memory is:
 *
 *     object    /NAME of shm_open(), which Linux shows as /dev/shm/NAME
 *     offset    type     field           (native byte order)
 *       0       u64      magic           "FUSESHM1" as bytes; stored last: valid from then on
 *       8       u32      version         1
 *      12       u32      header_bytes    128: where slot 0 begins
 *      16       u32      width           pixels
 *      20       u32      height          pixels
 *      24       u32      format          FUSE_SHM_GRAY8 ...
 *      28       u32      slots           2 to 1024
 *      32       u64      slot_bytes      slot to slot: 64 + frame_bytes, rounded up to 64
 *      40       u64      frame_bytes     of a picture: rows from top to bottom without gaps
 *      48       u64      written         frames published so far
 *      56       u64      heartbeat_ns    CLOCK_MONOTONIC when the producer last gave a sign of life
 *      64       u32      producer        its process id
 *      68       u32      state           1 running, 2 ended: no more frames will come
 *      72       u32      flags           FUSE_SHM_FULL_RANGE, FUSE_SHM_BT709
 *      76       52 bytes reserved, zero
 *     header_bytes + (k % slots) * slot_bytes: the slot of frame k = 0, 1, 2 ...
 *      +0       u64      sequence        2k+1 while frame k is being written, 2k+2 once it is there
 *      +8       u64      capture_ns      CLOCK_MONOTONIC of frame k
 *     +16       48 bytes reserved, zero
 *     +64       the picture
 *
 * The sequence is a seqlock. Writing frame k: sequence = 2k+1; release fence; picture, capture_ns;
 * sequence = 2k+2 with release; written = k+1 with release. Reading it: sequence with acquire must
 * be 2k+2; copy; acquire fence; sequence must still be 2k+2, otherwise the copy is torn: drop it.
 *
 * A producer makes a new object each time it starts, under the same name. A reader whose producer
 * was killed keeps the old object: it sees the heartbeat stop and looks whether the name means
 * another object by now (fuse_shm_replaced). */
#ifndef FUSE_SHM_H
#define FUSE_SHM_H

#if defined(__STRICT_ANSI__) && !defined(__cplusplus) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* include this header first, or define it yourself */
#endif

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#ifndef FUSE_SHM_MODE
#define FUSE_SHM_MODE 0600 /* who may read the pictures: the producer's user */
#endif

enum {
    FUSE_SHM_VERSION = 1,
    FUSE_SHM_HEADER_BYTES = 128,
    FUSE_SHM_SLOT_HEADER_BYTES = 64,
    FUSE_SHM_MAX_SLOTS = 1024,
    FUSE_SHM_MAX_SIDE = 32768
};

enum { /* format */
    FUSE_SHM_GRAY8 = 1,  /* height rows of width bytes */
    FUSE_SHM_GRAY16 = 2, /* height rows of width 16-bit numbers: thermal counts */
    FUSE_SHM_RGB24 = 3,  /* height rows of width RGB triples */
    FUSE_SHM_YUYV = 4,   /* Y U Y V; even width */
    FUSE_SHM_NV12 = 5,   /* the Y plane, then height/2 rows of UV pairs; even width and height */
    FUSE_SHM_I420 = 6    /* the Y plane, then the U plane, then the V plane; likewise */
};

enum { /* flags: what the numbers of the last three formats mean; 0 is limited range, BT.601 */
    FUSE_SHM_FULL_RANGE = 1, /* Y from 0 to 255 instead of 16 to 235 */
    FUSE_SHM_BT709 = 2       /* BT.709 instead of BT.601 */
};

enum { FUSE_SHM_RUNNING = 1, FUSE_SHM_ENDED = 2 }; /* state */

typedef struct {
    uint64_t magic;
    uint32_t version, header_bytes, width, height, format, slots;
    uint64_t slot_bytes, frame_bytes, written, heartbeat_ns;
    uint32_t producer, state, flags;
    uint32_t reserved[13];
} fuse_shm_header;

typedef struct {
    uint64_t sequence, capture_ns, reserved[6];
} fuse_shm_slot;

/* A mapped ring. Sizes are copies of the header's, checked once: what another process does to the
 * header later moves no address here. */
typedef struct {
    fuse_shm_header* header;
    size_t bytes;
    uint32_t width, height, format, flags, slots;
    uint64_t slot_bytes, frame_bytes;
    dev_t device;
    ino_t inode;
    int writes; /* mapped by its producer */
    char name[128];
} fuse_shm;

/* CLOCK_MONOTONIC in nanoseconds, as Python's time.monotonic_ns() on Linux. */
static inline uint64_t fuse_shm_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t fuse_shm_magic(void) {
    uint64_t magic;
    memcpy(&magic, "FUSESHM1", sizeof magic);
    return magic;
}

/* Bytes of a picture; 0 for a size or format that cannot be. */
static inline uint64_t fuse_shm_frame_bytes(uint32_t width, uint32_t height, uint32_t format) {
    const uint64_t pixels = (uint64_t)width * height;
    if (width == 0 || height == 0) return 0;
    if (width > FUSE_SHM_MAX_SIDE || height > FUSE_SHM_MAX_SIDE) return 0;
    switch (format) {
        case FUSE_SHM_GRAY8:
            return pixels;
        case FUSE_SHM_GRAY16:
            return 2 * pixels;
        case FUSE_SHM_RGB24:
            return 3 * pixels;
        case FUSE_SHM_YUYV:
            return width % 2 ? 0 : 2 * pixels;
        case FUSE_SHM_NV12:
        case FUSE_SHM_I420:
            return width % 2 || height % 2 ? 0 : pixels / 2 * 3;
        default:
            return 0;
    }
}

static inline uint64_t fuse_shm_slot_bytes(uint64_t frame_bytes) {
    return (FUSE_SHM_SLOT_HEADER_BYTES + frame_bytes + 63u) / 64u * 64u;
}

static inline fuse_shm_slot* fuse_shm_slot_of(const fuse_shm* ring, uint64_t frame) {
    char* base = (char*)ring->header + FUSE_SHM_HEADER_BYTES;
    return (fuse_shm_slot*)(void*)(base + frame % ring->slots * ring->slot_bytes);
}

/* "/NAME" of "NAME" or "/NAME". */
static inline int fuse_shm_path(char* path, size_t room, const char* name) {
    size_t length;
    if (*name == '/') ++name;
    length = strlen(name);
    if (length == 0 || strchr(name, '/') != NULL) return EINVAL;
    if (length + 2 > room) return ENAMETOOLONG;
    path[0] = '/';
    memcpy(path + 1, name, length + 1);
    return 0;
}

static inline int fuse_shm_fail(int error) {
    errno = error;
    return -1;
}

/* Producer: makes a ring, in place of one that has this name already. 0, or -1 with errno. */
static inline int fuse_shm_create(fuse_shm* ring, const char* name, uint32_t width, uint32_t height,
                                  uint32_t format, uint32_t flags, uint32_t slots) {
    struct stat status;
    fuse_shm_header* header;
    int file, error;
    memset(ring, 0, sizeof *ring);
    error = fuse_shm_path(ring->name, sizeof ring->name, name);
    if (error) return fuse_shm_fail(error);
    ring->frame_bytes = fuse_shm_frame_bytes(width, height, format);
    if (ring->frame_bytes == 0 || slots < 2 || slots > FUSE_SHM_MAX_SLOTS) {
        return fuse_shm_fail(EINVAL);
    }
    ring->slot_bytes = fuse_shm_slot_bytes(ring->frame_bytes);
    ring->bytes = (size_t)(FUSE_SHM_HEADER_BYTES + slots * ring->slot_bytes);
    shm_unlink(ring->name);
    file = shm_open(ring->name, O_CREAT | O_EXCL | O_RDWR, FUSE_SHM_MODE);
    if (file < 0) return -1;
    header = (fuse_shm_header*)MAP_FAILED;
    if (ftruncate(file, (off_t)ring->bytes) == 0 && fstat(file, &status) == 0) {
        header = (fuse_shm_header*)mmap(NULL, ring->bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                                        file, 0);
    }
    error = errno;
    close(file);
    if (header == (fuse_shm_header*)MAP_FAILED) {
        shm_unlink(ring->name);
        return fuse_shm_fail(error);
    }
    ring->header = header;
    ring->width = width, ring->height = height, ring->format = format, ring->flags = flags;
    ring->slots = slots, ring->writes = 1;
    ring->device = status.st_dev, ring->inode = status.st_ino;
    header->version = FUSE_SHM_VERSION, header->header_bytes = FUSE_SHM_HEADER_BYTES;
    header->width = width, header->height = height, header->format = format, header->flags = flags;
    header->slots = slots, header->slot_bytes = ring->slot_bytes;
    header->frame_bytes = ring->frame_bytes;
    header->heartbeat_ns = fuse_shm_now();
    header->producer = (uint32_t)getpid(), header->state = FUSE_SHM_RUNNING;
    __atomic_store_n(&header->magic, fuse_shm_magic(), __ATOMIC_RELEASE);
    return 0;
}

/* Producer: a sign of life without a frame; publishing is one, too. */
static inline void fuse_shm_beat(fuse_shm* ring) {
    __atomic_store_n(&ring->header->heartbeat_ns, fuse_shm_now(), __ATOMIC_RELEASE);
}

/* Producer: where to write the next picture. Publish it before the next call. */
static inline void* fuse_shm_begin(fuse_shm* ring) {
    const uint64_t frame = ring->header->written;
    fuse_shm_slot* slot = fuse_shm_slot_of(ring, frame);
    __atomic_store_n(&slot->sequence, 2 * frame + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return slot + 1;
}

/* Producer: shows readers the picture, captured at this time of CLOCK_MONOTONIC. */
static inline void fuse_shm_publish(fuse_shm* ring, uint64_t capture_ns) {
    const uint64_t frame = ring->header->written;
    fuse_shm_slot* slot = fuse_shm_slot_of(ring, frame);
    slot->capture_ns = capture_ns;
    __atomic_store_n(&slot->sequence, 2 * frame + 2, __ATOMIC_RELEASE);
    fuse_shm_beat(ring);
    __atomic_store_n(&ring->header->written, frame + 1, __ATOMIC_RELEASE);
}

/* Whether the name means another object than the one that is mapped, or none. */
static inline int fuse_shm_replaced(const fuse_shm* ring) {
    struct stat status;
    int other, file = shm_open(ring->name, O_RDONLY, 0);
    if (file < 0) return 1;
    other = fstat(file, &status) != 0 || status.st_dev != ring->device ||
            status.st_ino != ring->inode;
    close(file);
    return other;
}

/* Unmaps. The producer's says that the stream has ended, and takes the name away. */
static inline void fuse_shm_close(fuse_shm* ring) {
    if (ring->header == NULL) return;
    if (ring->writes) {
        __atomic_store_n(&ring->header->state, (uint32_t)FUSE_SHM_ENDED, __ATOMIC_RELEASE);
        if (!fuse_shm_replaced(ring)) shm_unlink(ring->name);
    }
    munmap(ring->header, ring->bytes);
    ring->header = NULL;
}

/* Reader: maps a ring. 0, or -1 with errno: ENOENT no such name, EAGAIN not ready yet, EPROTO no
 * ring or one of another version. */
static inline int fuse_shm_open(fuse_shm* ring, const char* name) {
    struct stat status;
    fuse_shm_header* header;
    int file, fits, error;
    memset(ring, 0, sizeof *ring);
    error = fuse_shm_path(ring->name, sizeof ring->name, name);
    if (error) return fuse_shm_fail(error);
    file = shm_open(ring->name, O_RDONLY, 0);
    if (file < 0) return -1;
    header = (fuse_shm_header*)MAP_FAILED;
    error = EAGAIN; /* made, but without a size: its producer has not come further */
    if (fstat(file, &status) != 0) {
        error = errno;
    } else if (status.st_size >= FUSE_SHM_HEADER_BYTES) {
        ring->bytes = (size_t)status.st_size;
        header = (fuse_shm_header*)mmap(NULL, ring->bytes, PROT_READ, MAP_SHARED, file, 0);
        error = errno;
    }
    close(file);
    if (header == (fuse_shm_header*)MAP_FAILED) return fuse_shm_fail(error);
    ring->header = header;
    ring->device = status.st_dev, ring->inode = status.st_ino;
    if (__atomic_load_n(&header->magic, __ATOMIC_ACQUIRE) == 0) {
        fuse_shm_close(ring);
        return fuse_shm_fail(EAGAIN);
    }
    ring->width = header->width, ring->height = header->height, ring->format = header->format;
    ring->flags = header->flags, ring->slots = header->slots;
    ring->slot_bytes = header->slot_bytes, ring->frame_bytes = header->frame_bytes;
    fits = header->magic == fuse_shm_magic() && header->version == FUSE_SHM_VERSION &&
           header->header_bytes == FUSE_SHM_HEADER_BYTES && ring->slots >= 2 &&
           ring->slots <= FUSE_SHM_MAX_SLOTS && ring->frame_bytes != 0 &&
           ring->frame_bytes == fuse_shm_frame_bytes(ring->width, ring->height, ring->format) &&
           ring->slot_bytes == fuse_shm_slot_bytes(ring->frame_bytes) &&
           FUSE_SHM_HEADER_BYTES + ring->slots * ring->slot_bytes <= ring->bytes;
    if (fits) return 0;
    fuse_shm_close(ring);
    return fuse_shm_fail(EPROTO);
}

/* Reader: frames published so far; the newest is one less. */
static inline uint64_t fuse_shm_written(const fuse_shm* ring) {
    return __atomic_load_n(&ring->header->written, __ATOMIC_ACQUIRE);
}

/* Reader: copies a published frame. 1, or 0 when it was overwritten meanwhile. */
static inline int fuse_shm_read(const fuse_shm* ring, uint64_t frame, void* picture,
                                uint64_t* capture_ns) {
    fuse_shm_slot* slot = fuse_shm_slot_of(ring, frame);
    if (__atomic_load_n(&slot->sequence, __ATOMIC_ACQUIRE) != 2 * frame + 2) return 0;
    memcpy(picture, slot + 1, (size_t)ring->frame_bytes);
    *capture_ns = slot->capture_ns;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&slot->sequence, __ATOMIC_RELAXED) == 2 * frame + 2;
}

/* Reader: waits until frame `frame` is published. 1, or 0 at the end of the stream or of the time. */
static inline int fuse_shm_wait(const fuse_shm* ring, uint64_t frame, uint64_t timeout_ns) {
    const uint64_t end = fuse_shm_now() + timeout_ns;
    const struct timespec nap = {0, 300000};
    while (fuse_shm_written(ring) <= frame) {
        if (__atomic_load_n(&ring->header->state, __ATOMIC_ACQUIRE) == FUSE_SHM_ENDED) {
            return fuse_shm_written(ring) > frame; /* the last one may have come in between */
        }
        if (fuse_shm_now() >= end) return 0;
        nanosleep(&nap, NULL);
    }
    return 1;
}

#endif /* FUSE_SHM_H */
