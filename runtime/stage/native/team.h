// A fixed team of threads that runs one function together and meets at barriers in it.
//
// A decode step passes some three hundred barriers, most of them microseconds apart, so members
// spin; whoever waits longer sleeps, so that a machine with other work does not lose a core to it.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace bulkhead {

class Team {
  public:
    explicit Team(int size) : size_(size) {
        for (int member = 1; member < size; member++)
            threads_.emplace_back([this, member] { serve(member); });
    }

    ~Team() {
        job_ = nullptr;
        begin();
        for (std::thread &thread : threads_) thread.join();
    }

    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    int size() const { return size_; }

    // Runs job(member) on every member; the caller is member 0. Returns when all are done.
    void run(const std::function<void(int)> &job) {
        job_ = &job;
        begin();
        job(0);
        barrier();
    }

    // For members inside a job: returns when all have come here.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
        } else {
            await(round_, round);
        }
    }

  private:
    static constexpr int SPINS = 4000; // some 50 to 150 microseconds

    static void await(const std::atomic<uint32_t> &value, uint32_t old) {
        for (int spin = 0; spin < SPINS; spin++) {
            if (value.load(std::memory_order_acquire) != old) return;
            _mm_pause();
        }
        value.wait(old, std::memory_order_acquire);
    }

    void begin() {
        begun_.fetch_add(1, std::memory_order_release);
        begun_.notify_all();
    }

    void serve(int member) {
        for (uint32_t seen = 0;; seen++) {
            await(begun_, seen);
            if (!job_) return;
            (*job_)(member);
            barrier();
        }
    }

    const int size_;
    const std::function<void(int)> *job_ = nullptr;
    std::atomic<uint32_t> begun_{0}, round_{0};
    std::atomic<int> arrived_{0};
    std::vector<std::thread> threads_;
};

// A phase hands its parts to whichever member is free; every phase of a call has a counter.
class Tickets {
  public:
    explicit Tickets(size_t phases) : counters_(phases) {}
    int64_t take(size_t phase) {
        return counters_[phase].value.fetch_add(1, std::memory_order_relaxed);
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    std::vector<Counter> counters_;
};

} // namespace bulkhead
