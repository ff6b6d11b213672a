#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fuse {
namespace {

// What a processor is told in a loop that waits.
inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ __volatile__("yield");
#endif
}

int usable_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

std::atomic<int> wanted{0};  // 0: not asked yet

thread_local bool inside_loop = false;

// Tens of microseconds of looking before going to sleep: an op of several loops, one behind the
// other, would otherwise wake its workers for each.
template <class Done>
void spin(const Done& done) {
    for (int look = 0; look < 1024 && !done(); ++look) relax();
}

// Workers sleep between ops: an inference runtime has its own threads on the same cores.
class Pool {
public:
    explicit Pool(int workers) {
        for (int i = 0; i < workers; ++i) threads_.emplace_back([this, i] { work(i + 1); });
    }

    ~Pool() {
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int workers() const { return static_cast<int>(threads_.size()); }

    void run(std::ptrdiff_t count, std::ptrdiff_t chunk, const RangeBody& body) {
        {
            const std::lock_guard lock(mutex_);
            body_ = &body;
            count_ = count;
            chunk_ = chunk;
            pending_ = workers();
            error_ = nullptr;
            ++generation_;
        }
        wake_.notify_all();
        execute(0);  // the caller takes the first range, which is never empty
        spin([this] { return pending_.load() == 0; });
        std::unique_lock lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        body_ = nullptr;
        if (error_) std::rethrow_exception(error_);
    }

private:
    void work(int index) {
        unsigned long seen = 0;
        for (;;) {
            spin([&] { return generation_.load() != seen; });
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
                if (stop_) return;
                seen = generation_;
            }
            execute(index);
            const std::lock_guard lock(mutex_);
            if (--pending_ == 0) done_.notify_one();
        }
    }

    void execute(int index) {
        const std::ptrdiff_t begin = index * chunk_, end = std::min(count_, begin + chunk_);
        if (begin >= end) return;
        inside_loop = true;
        try {
            (*body_)(begin, end);
        } catch (...) {
            const std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
        inside_loop = false;
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const RangeBody* body_ = nullptr;
    std::ptrdiff_t count_ = 0, chunk_ = 0;
    // Written under the mutex; read outside of it to spin.
    std::atomic<int> pending_{0};
    std::atomic<unsigned long> generation_{0};
    bool stop_ = false;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
};

// Neither is destroyed at exit: the interpreter may still run kernels in other threads then.
std::mutex& pool_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

std::unique_ptr<Pool>& pool() {
    static auto* pool = new std::unique_ptr<Pool>;
    return *pool;
}

#if defined(__unix__) || defined(__APPLE__)
// Threads do not survive a fork. The parent holds the lock across it, so that its child does not
// inherit a loop half done; the child forgets the pool without joining threads it does not have.
void before_fork() { pool_mutex().lock(); }
void after_fork_parent() { pool_mutex().unlock(); }
void after_fork_child() {
    (void)pool().release();
    pool_mutex().unlock();
}
const int fork_handlers = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
#endif

}  // namespace

int num_threads() {
    int count = wanted.load();
    if (count == 0) {
        count = usable_processors();
        wanted.store(count);
    }
    return count;
}

void set_num_threads(int count) { wanted.store(std::max(1, count)); }

void parallel_for(std::ptrdiff_t count, std::ptrdiff_t grain, const RangeBody& body) {
    if (count <= 0) return;
    const std::ptrdiff_t grains = (count + grain - 1) / grain;
    const auto ranges = std::min<std::ptrdiff_t>(num_threads(), grains);
    std::unique_lock lock(pool_mutex(), std::defer_lock);
    if (ranges <= 1 || inside_loop || !lock.try_lock()) {
        body(0, count);
        return;
    }
    // Workers without a range go back to sleep: threads are not made anew for every size.
    const int workers = num_threads() - 1;
    if (!pool() || pool()->workers() != workers) pool() = std::make_unique<Pool>(workers);
    const std::ptrdiff_t chunk = (grains + ranges - 1) / ranges * grain;
    pool()->run(count, chunk, body);
}

}  // namespace fuse
