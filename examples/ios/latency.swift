// How long an edit takes, on a Mac with macOS 15 or later:
//
//     swiftc -O -parse-as-library ConceptPack.swift latency.swift -o latency && ./latency FOLDER [all|cpu|ane|gpu] [runs]
//
// One JSON line a concept; docs/phones.md says what the keys mean. Read-checked only: no Swift compiler was at hand.

import CoreML
import Foundation

@main
struct Latency {
    static func main() async throws {
        let arguments = CommandLine.arguments
        guard arguments.count > 1 else {
            print("usage: latency FOLDER [all|cpu|ane|gpu] [runs]")
            exit(2)
        }
        let kind = arguments.count > 2 ? arguments[2] : "all"
        let units: [String: MLComputeUnits] = [
            "all": .all, "cpu": .cpuOnly, "ane": .cpuAndNeuralEngine, "gpu": .cpuAndGPU,
        ]
        let runs = arguments.count > 3 ? Int(arguments[3]) ?? 50 : 50
        let compiling = ContinuousClock.now
        let pack = try await ConceptPack(folder: URL(filePath: arguments[1]), units: units[kind] ?? .all)
        let compiled = (ContinuousClock.now - compiling) / .seconds(1)
        var buffer: CVPixelBuffer?
        let side = pack.description.side
        CVPixelBufferCreate(nil, side, side, kCVPixelFormatType_32BGRA, nil, &buffer)
        for concept in pack.names {
            let loading = ContinuousClock.now
            _ = try await pack.edit(buffer!, concept: concept)
            let first = (ContinuousClock.now - loading) / .seconds(1)
            var times: [Double] = []
            for _ in 0..<runs {
                let started = ContinuousClock.now
                _ = try await pack.edit(buffer!, concept: concept)
                times.append((ContinuousClock.now - started) / .milliseconds(1))
            }
            times.sort()
            let row: [String: Any] = [
                "runtime": "coreml", "units": kind, "concept": concept, "side": side, "runs": runs,
                "compile_seconds": compiled, "first_seconds": first,
                "median_ms": times[runs / 2], "p90_ms": times[runs * 9 / 10],
                "system": ProcessInfo.processInfo.operatingSystemVersionString,
            ]
            print(String(decoding: try JSONSerialization.data(withJSONObject: row, options: .sortedKeys), as: UTF8.self))
            await pack.forget(concept)
        }
    }
}
